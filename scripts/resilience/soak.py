"""Kill a replica each minute under mixed load, and look for growth in all processes.

Generators and classifiers die in turn, always the youngest replica, so that the others live as long
as the run. The exit status is 1 if a process grows or a request fails, 2 if the tool itself fails
or has not measured enough.
"""

import argparse
import contextlib
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.report import Report, Table, describe_machine, print_report
from cluster.errors import TandemError
from cluster.launch.processes import interrupt_on_termination
from cluster.launch.serve_api import ServeApi
from resilience.accounting import Answer, kind_of
from resilience.growth import Growth, Sample, measure_growth
from resilience.load import Load
from resilience.mixes import Mix
from resilience.repeated import Repeated
from resilience.samples import METRICS, OURS, is_ours, read_samples
from resilience.testbed import CLASSIFIERS, GENERATOR, Setup, Testbed, start

KILL_S = 60.0
SAMPLE_S = 5.0
WARM_UP_SHARE, LIFE_SHARE = 0.3, 0.5
"""Shares of the run: caches fill, and a process must be seen for as long after that."""
MIX = Mix(greedy=16, sampled=4, classify=2, max_tokens=40)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="duration (default: 30)")
    parser.add_argument("--engine", choices=["sim", "vllm"], default="sim", help="default: sim")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the memory (.svg)")
    return parser


class Sampler:
    """Samples of all processes of a cluster."""

    def __init__(self, testbed: Testbed, began_s: float) -> None:
        self.samples: list[Sample] = []
        self._testbed = testbed
        self._began_s = began_s

    def sample(self) -> None:
        """Add a sample of each process, and the number of metric series."""
        at_s = time.monotonic() - self._began_s
        self.samples += read_samples(self._testbed, at_s)
        with contextlib.suppress(httpx.HTTPError):
            self.samples.append(self._read_series(at_s))

    def _read_series(self, at_s: float) -> Sample:
        """Return the number of metric series of the router that answers, as a sample."""
        url = f"{self._testbed.state.http_url}/metrics"
        response = httpx.get(url, timeout=10, trust_env=False).raise_for_status()
        series = sum(not line.startswith("#") for line in response.text.splitlines())
        return Sample(METRICS, at_s, 0.0, (("series", series),))


def too_large(growths: Sequence[Growth]) -> list[Growth]:
    """Return what grew too much in our processes."""
    return [one for one in growths if one.is_excessive and is_ours(one.process)]


def kill_youngest(testbed: Testbed, deployment: str) -> bool:
    """Kill the youngest replica of a deployment; return False if two do not run."""
    with ServeApi(testbed.state.dashboard_url) as api:
        application = api.application(testbed.state.application)
    running = [
        replica
        for one in (application.deployments if application else ())
        if one.name == deployment
        for replica in one.replicas
        if replica.state == "RUNNING" and replica.pid
    ]
    if len(running) < 2:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(max(running, key=lambda one: one.started_at or 0.0).pid).kill()
    return True


@dataclass(frozen=True, slots=True)
class SoakResult:
    """Measurements of one run. Times are in seconds since its start."""

    samples: list[Sample]
    kills_s: list[float]
    answers: list[Answer]

    def errors(self) -> dict[str, int]:
        """Return the failed, diverged and broken requests by client kind and error."""
        errors = Counter(f"{kind_of(one.client)}: {one.error}" for one in self.answers if one.error)
        errors["diverged"] = sum(one.diverged for one in self.answers)
        errors["broken connections"] = sum(len(one.broken_s) for one in self.answers)
        return {error: number for error, number in errors.items() if number}


def find_gaps(growths: Sequence[Growth], result: SoakResult, total_s: float) -> list[str]:
    """Return what the run should have measured and did not."""
    sampled = {sample.process for sample in result.samples}
    # A cluster without HAProxy has none of its processes.
    roles = [role for role in OURS if role != "haproxy" or any(p.startswith(role) for p in sampled)]
    gaps = [
        f"no growth of {role} was measured; run longer"
        for role in (*roles, METRICS)
        if not any(one.process.startswith(role) for one in growths)
    ]
    if total_s > 2 * KILL_S and not result.kills_s:
        gaps.append("no replica was killed")
    return gaps


def run_soak(args: argparse.Namespace) -> SoakResult:
    """Run the load and the kills.

    Raises:
        TargetError: The cluster or the load does not work without faults.
    """
    kills_s: list[float] = []
    with start(Setup(args.engine)) as testbed, Load(testbed, MIX, args.seed) as load:
        load.wait_served()
        began_s = time.monotonic()
        sampler = Sampler(testbed, began_s)
        with Repeated(SAMPLE_S, sampler.sample):
            while (left_s := began_s + args.minutes * 60 - time.monotonic()) > 0:
                time.sleep(min(left_s, KILL_S))
                deployment = (GENERATOR, CLASSIFIERS)[len(kills_s) % 2]
                # A kill shortly before the end would not be recovered from.
                if left_s > KILL_S and kill_youngest(testbed, deployment):
                    kills_s.append(time.monotonic() - began_s)
                load.check()
    return SoakResult(sampler.samples, kills_s, load.answers)


def make_report(growths: Sequence[Growth], result: SoakResult) -> Report:
    """Return the table of memory, and of every other quantity that grew too much."""
    shown = [
        one for one in growths if (one.quantity == "memory_mb" and one.first) or one.is_excessive
    ]
    rows = [
        [
            one.process,
            one.quantity,
            f"{one.first:.1f}",
            f"{one.last:.1f}",
            f"{one.per_minute:.3f} (≥ {one.at_least_per_minute:.3f})",
            f"{one.bound_per_minute:g}" if is_ours(one.process) else "–",
            "grows" if one.is_excessive else "",
        ]
        for one in sorted(shown, key=lambda one: (not is_ours(one.process), one.process))
    ]
    columns = ("process", "quantity", "first", "last", "per minute", "bound", "result")
    notes = [f"{number} × {error}" for error, number in result.errors().items()]
    notes.append(f"{len(result.answers)} requests, {len(result.kills_s)} killed replicas.")
    return Report(keys={}, tables=[Table("Growth after the warm-up", columns, rows)], notes=notes)


def draw(result: SoakResult, path: Path) -> None:
    """Draw the memory of all processes of ours over time; dotted lines are kills."""
    from matplotlib.figure import Figure  # only here, since it is slow to import

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    by_process: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in result.samples:
        if is_ours(sample.process) and sample.memory_mb:
            by_process[sample.process].append(sample)
    colors = {role: f"C{number}" for number, role in enumerate(OURS)}
    labelled = set()
    for process, samples in by_process.items():
        role = process.partition(" ")[0]
        minutes = [sample.at_s / 60 for sample in samples]
        label = None if role in labelled else role
        memory_mb = [sample.memory_mb for sample in samples]
        axes.plot(minutes, memory_mb, color=colors[role], label=label, linewidth=1)
        labelled.add(role)
    for kill_s in result.kills_s:
        axes.axvline(kill_s / 60, color="grey", linestyle=":", linewidth=0.7)
    axes.set_xlabel("minutes")
    axes.set_ylabel("private memory, MB")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", ncols=len(OURS), fontsize="small")
    figure.savefig(path)


def make_document(
    args: argparse.Namespace, growths: Sequence[Growth], result: SoakResult
) -> dict[str, Any]:
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    return {
        "requests": len(result.answers),
        "errors": result.errors(),
        "kills_s": result.kills_s,
        "growth": [{**asdict(one), "is_excessive": one.is_excessive} for one in growths],
        "samples": [asdict(sample) for sample in result.samples],
        "settings": settings,
        "machine": describe_machine(),
    }


def main() -> int:
    """Run the soak test; all processes that this started have ended on return."""
    args = make_parser().parse_args()
    interrupt_on_termination()
    try:
        result = run_soak(args)
    except (TandemError, psutil.Error) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("soak: interrupted", file=sys.stderr)
        return 130
    total_s = args.minutes * 60
    growths = measure_growth(result.samples, WARM_UP_SHARE * total_s, LIFE_SHARE * total_s)
    print_report(make_report(growths, result))
    if args.json is not None:
        document = make_document(args, growths, result)
        args.json.write_text(json.dumps(document) + "\n", encoding="utf-8")
    if args.plot is not None:
        draw(result, args.plot)
    if too_large(growths) or result.errors():
        return 1
    gaps = find_gaps(growths, result, total_s)
    for gap in gaps:
        print(f"soak: {gap}", file=sys.stderr)
    return 2 if gaps else 0


if __name__ == "__main__":
    sys.exit(main())
