"""Inject faults into a cluster under load and report what clients see.

Starts a cluster with two replicas of everything on free ports. The exit status is 1 if a fault
misses a target, or if descriptors, threads or tasks are left after the load; 2 if the tool itself
fails.
"""

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.endpoint import TargetError
from benchmarks.report import Report, Table, describe_machine, print_report
from cluster.errors import TandemError
from cluster.launch.processes import interrupt_on_termination
from resilience.accounting import Answer, FaultResult, Window, as_json, summarize, totals
from resilience.faults import FAULTS, SHORT, scale, update
from resilience.load import Load
from resilience.mixes import MIXES, Mix, choose_mix
from resilience.repeated import Repeated
from resilience.samples import read_counts, wait_nothing_left
from resilience.testbed import POLL_S, RECOVERY_S, Setup, Testbed, count_replaced, start

SETTLE_S = 2.0
"""Load after the recovery from each fault."""
CHURN_PAUSE_S = 20.0
"""Time between a rolling update and the next change of the number of replicas."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--short", action="store_true", help=f"these faults only: {','.join(SHORT)} (3 minutes)"
    )
    parser.add_argument("--engine", choices=list(MIXES), default="sim", help="default: sim")
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="vLLM's workers per replica: 1 or 3; with vllm-tiny, 1 or 2",
    )
    parser.add_argument(
        "--faults",
        type=parse_faults,
        metavar="FAULT,...",
        help=f"faults, in this order; the default is all in random order: {','.join(FAULTS)}",
    )
    parser.add_argument(
        "--churn",
        action="store_true",
        help="update and scale the generators throughout (default without --short and --faults)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of order, victims and prompts (default: 0)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    return parser


def parse_faults(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - FAULTS.keys():
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(FAULTS)}"
        )
    return names


def select_faults(args: argparse.Namespace) -> list[str]:
    """Return the names of the faults to inject, in order."""
    if args.faults:
        return list(args.faults)
    if args.short:
        return list(SHORT)
    names = list(FAULTS)
    random.Random(args.seed).shuffle(names)
    return names


@dataclass(frozen=True, slots=True)
class Injection:
    """Times and effects of an injected fault."""

    name: str
    before_s: float
    hit_s: float
    ended_s: float
    restarted: int
    healthy_s: float | None


@dataclass(slots=True)
class Run:
    """Results of a run so far."""

    seed: int
    injections: list[Injection] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Faults that the cluster lacks something for, and what."""
    left: list[str] = field(default_factory=list)
    """Counts that the load has left above those before it."""
    survivors: list[str] = field(default_factory=list)
    """Processes that were compared."""

    def inject_all(self, testbed: Testbed, load: Load, names: Sequence[str]) -> None:
        """Inject the faults one after the other.

        Raises:
            TargetError: One cannot be injected, or the load ended.
        """
        for name in names:
            self.injections.append(inject(testbed, name, random.Random(f"{self.seed} {name}")))
            load.check()
            report_progress(self.results(load.answers)[-1])

    def results(self, answers: Sequence[Answer]) -> list[tuple[str, FaultResult]]:
        """Return the result of each fault; a window ends when the next one begins."""
        ends = [one.hit_s for one in self.injections[1:]] + [float("inf")]
        return [
            (
                one.name,
                summarize(
                    answers,
                    Window(one.hit_s, one.ended_s, end),
                    before_s=one.before_s,
                    restarted=one.restarted,
                    healthy_s=one.healthy_s,
                ),
            )
            for one, end in zip(self.injections, ends, strict=True)
        ]


def inject(testbed: Testbed, name: str, rng: random.Random) -> Injection:
    """Inject a fault and wait for the recovery from it.

    Raises:
        TargetError: The cluster is not healthy before, or the fault cannot be injected.
    """
    if not testbed.wait_healthy():
        raise TargetError(f"The cluster was not healthy within {RECOVERY_S:g} s before {name!r}.")
    before_s = time.monotonic()
    time.sleep(SETTLE_S + rng.random())
    before = testbed.replicas()
    hit_s = time.monotonic()
    has_recovered = FAULTS[name].inject(testbed, rng)
    deadline = time.monotonic() + RECOVERY_S
    while not (is_well := has_recovered() and testbed.is_healthy()):
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    healthy_s = time.monotonic() - hit_s if is_well else None
    time.sleep(SETTLE_S)
    restarted = count_replaced(before, testbed)
    return Injection(name, before_s, hit_s, time.monotonic(), restarted, healthy_s)


def churn(testbed: Testbed, seed: int) -> Repeated:
    """Return a context manager that updates and scales the generators in turn, in a thread."""
    rng = random.Random(seed)
    changes = itertools.cycle((update, scale))

    def change() -> None:
        try:
            has_changed = next(changes)(testbed, rng)
            deadline = time.monotonic() + RECOVERY_S
            while not has_changed() and time.monotonic() < deadline:
                time.sleep(POLL_S)
        except (TandemError, psutil.Error, OSError) as error:  # such as a dead controller
            print(f"chaos: a change failed: {error}", file=sys.stderr)

    return Repeated(CHURN_PAUSE_S, change)


def report_progress(result: tuple[str, FaultResult]) -> None:
    row = make_row(*result)
    print("chaos: " + "  ".join(row), file=sys.stderr, flush=True)


COLUMNS = (
    *("fault", "requests", "failed", "diverged", "broken", "restarted"),
    *("recovery, s", "healthy, s", "result"),
)


def make_row(name: str, result: FaultResult) -> list[str]:
    missed = result.missed(FAULTS[name].target)
    return [
        name,
        *(str(getattr(result, key)) for key in ("requests", "failed", "diverged")),
        str(result.broken_at_ingress),
        str(result.restarted),
        f"{result.recovery_s:.2f} ({result.usual_gap_s:.2f})",
        "–" if result.healthy_s is None else f"{result.healthy_s:.1f}",
        f"missed: {', '.join(missed)}" if missed else "met",
    ]


def make_report(run: Run, results: Sequence[tuple[str, FaultResult]]) -> Report:
    """Return the table of all faults and the errors of their requests."""
    errors = [
        f"{name}: {number} × {error}"
        for name, result in results
        for error, number in result.errors.items()
    ]
    skipped = [f"{name} was skipped; it needs {need}." for name, need in run.skipped.items()]
    left = [f"left by the load: {text}" for text in run.left]
    notes = (
        "broken: broken or refused sockets of clients, which repeated the request.",
        "recovery: longest wait of a client for data after the fault, and before it.",
        "healthy: time from the fault to healthy deployments.",
    )
    rows = [make_row(name, result) for name, result in results]
    return Report(
        keys={},
        tables=[Table("Faults under load", COLUMNS, rows)],
        notes=[*errors, *left, *skipped, *notes],
    )


def make_document(
    args: argparse.Namespace, run: Run, results: Sequence[tuple[str, FaultResult]]
) -> dict[str, Any]:
    targets = [FAULTS[name].target for name, _ in results]
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    return {
        **totals([result for _, result in results], targets),
        "faults": {name: as_json(result, FAULTS[name].target) for name, result in results},
        "skipped": run.skipped,
        "left": run.left,
        "survivors": run.survivors,
        "settings": settings,
        "load": asdict(mix_of(args)),
        "machine": describe_machine(),
    }


def mix_of(args: argparse.Namespace) -> Mix:
    return choose_mix(args.engine, args.tensor_parallel, len(os.sched_getaffinity(0)))


def run_faults(args: argparse.Namespace, run: Run) -> list[tuple[str, FaultResult]]:
    """Start the cluster and the load, inject the faults, and return their results.

    Raises:
        TargetError: The cluster or the load does not work without faults.
    """
    names = select_faults(args)
    wants_disk = any(FAULTS[name].needs_disk for name in names)
    setup = Setup(args.engine, args.tensor_parallel, wants_disk and os.geteuid() == 0)
    run.skipped = {name: need for name in names if (need := FAULTS[name].missing(setup))}
    names = [name for name in names if name not in run.skipped]
    with start(setup) as testbed:
        before = read_counts(testbed)
        with Load(testbed, mix_of(args), args.seed) as load:
            load.wait_served()
            if args.churn or not (args.short or args.faults):
                with churn(testbed, args.seed):
                    run.inject_all(testbed, load, names)
            else:
                run.inject_all(testbed, load, names)
        run.left, run.survivors = wait_nothing_left(testbed, before)
    return run.results(load.answers)


def main() -> int:
    """Inject the faults; all processes that this started have ended on return."""
    args = make_parser().parse_args()
    interrupt_on_termination()
    run = Run(args.seed)
    try:
        results = run_faults(args, run)
    except (TandemError, psutil.Error) as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("chaos: interrupted", file=sys.stderr)
        return 130
    print_report(make_report(run, results))
    if args.json is not None:
        document = make_document(args, run, results)
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    has_missed = any(result.missed(FAULTS[name].target) for name, result in results)
    return int(has_missed or bool(run.left))


if __name__ == "__main__":
    sys.exit(main())
