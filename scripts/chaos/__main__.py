"""Kill parts of a cluster under load and report failures, restarts and outages.

Starts the default configuration on free ports, or uses a running cluster (--home). Missed goals
are reported; the exit status is 0 unless the tool itself fails.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import psutil

from benchmarks.endpoint import TargetError
from benchmarks.report import Report, Table, describe_machine, print_report
from chaos.accounting import FaultResult, Window, count_restarted, summarize
from chaos.load import Load
from chaos.target import (
    CLASSIFY,
    FAULTS,
    JOB,
    POLL_S,
    RECOVERY_S,
    STREAM,
    Cluster,
    Victim,
    open_cluster,
)
from cluster.errors import TandemError

KINDS = (STREAM, CLASSIFY, JOB)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        type=_faults,
        default=tuple(FAULTS),
        metavar="FAULT,...",
        help=f"faults to inject, in this order (default: {','.join(FAULTS)})",
    )
    parser.add_argument(
        "--seconds",
        type=_positive,
        default=8.0,
        help="load before each fault and after the recovery, in seconds (default: 8)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of victims, moments and prompts (default: 0)"
    )
    parser.add_argument(
        "--home", type=Path, help="TANDEM_HOME of a running cluster; its processes are killed"
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("TANDEM_API_KEY"),
        help="API key of that cluster (default: $TANDEM_API_KEY)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    return parser


def _faults(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - FAULTS.keys():
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(FAULTS)}"
        )
    return names


def _positive(text: str) -> float:
    if not (seconds := float(text)) > 0:
        raise argparse.ArgumentTypeError("must be positive")
    return seconds


def inject(cluster: Cluster, name: str, seconds: float, seed: int) -> FaultResult:
    """Kill one process under load and return the effect.

    Raises:
        TargetError: The cluster is not ready, or has no such process.
    """
    fault = FAULTS[name]
    rng = random.Random(f"{seed} {name}")
    cluster.wait_ready()
    before = cluster.replicas()
    with Load(cluster, seed) as load:
        load.wait_served()
        began_s = time.monotonic()
        time.sleep(seconds + rng.random())
        if (victim := fault.find(cluster, rng)) is None:
            raise TargetError(f"Found no process for the fault {name!r}.")
        killed_s = time.monotonic()
        gone_s = victim.kill()
        recovered = wait_recovered(cluster, name, victim)
        recovered_s = time.monotonic() - killed_s if recovered else None
        time.sleep(seconds)
        load.check()
        after = cluster.replicas()
        window = Window(began_s, killed_s, gone_s, time.monotonic())
    return summarize(
        load.attempts,
        window,
        kinds=KINDS,
        served_by_victim=fault.served,
        restarted=count_restarted(before, after),
        recovered_s=recovered_s,
    )


def wait_recovered(cluster: Cluster, name: str, victim: Victim) -> bool:
    """Wait for a replacement and healthy deployments; return False after ``RECOVERY_S``."""
    deadline = time.monotonic() + RECOVERY_S
    while time.monotonic() < deadline:
        replicas = cluster.replicas()
        if victim.replica:
            replaced = victim.replica not in replicas
        else:
            current = FAULTS[name].find(cluster, random.Random(0))
            replaced = current is not None and current.process != victim.process
        if replicas and replaced:
            return True
        time.sleep(POLL_S)
    return False


def make_report(results: Mapping[str, FaultResult], seconds: float) -> Report:
    """Return the table of all faults and the errors of their requests."""
    outage_columns = tuple(f"{kind}, s" for kind in KINDS)
    counts = ("requests", "failed", "diverged", "lost", "restarted")
    columns = ("fault", *counts, *outage_columns, "healthy, s")
    rows = [make_row(name, result) for name, result in results.items()]
    errors = [
        f"{name}, {title}: {', '.join(f'{number} × {error}' for error, number in found.items())}"
        for name, result in results.items()
        for title, found in (("failed", result.errors), ("lost", result.lost))
        if found
    ]
    notes = (
        "diverged: greedy streams with another text than before the kill.",
        "lost: requests on sockets of the killed process.",
        f"{', '.join(KINDS)}: longest time without data of a successful response after the kill, "
        f"and in the {seconds:g} s before it.",
        "healthy: time from the kill to healthy deployments.",
    )
    return Report(
        keys={},
        tables=[Table("Faults under load", (*columns, "goal", "result"), rows)],
        notes=[*errors, *notes],
    )


def make_row(name: str, result: FaultResult) -> list[str]:
    goal = FAULTS[name].goal
    bounds = dataclasses.asdict(goal).items()
    missed = result.missed(goal)
    return [
        name,
        str(result.requests),
        str(result.failed),
        str(result.diverged),
        str(sum(result.lost.values())),
        str(result.restarted),
        *(f"{result.outage_s[kind]:.1f} ({result.usual_gap_s[kind]:.1f})" for kind in KINDS),
        "–" if result.recovered_s is None else f"{result.recovered_s:.1f}",
        ", ".join(f"{key} ≤ {bound:g}" for key, bound in bounds if bound is not None),
        f"missed: {', '.join(missed)}" if missed else "met",
    ]


def as_json(args: argparse.Namespace, results: Mapping[str, FaultResult]) -> str:
    faults = {
        name: {
            **dataclasses.asdict(result),
            "goal": dataclasses.asdict(FAULTS[name].goal),
            "missed": result.missed(FAULTS[name].goal),
        }
        for name, result in results.items()
    }
    settings = {"only": args.only, "seconds": args.seconds, "seed": args.seed}
    document = {"faults": faults, "settings": settings, "machine": describe_machine()}
    return json.dumps(document, indent=2) + "\n"


def main() -> int:
    """Inject the faults; all processes that this started have ended on return."""
    args = make_parser().parse_args()
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _interrupt)
    results: dict[str, FaultResult] = {}
    try:
        with open_cluster(args.home, args.api_key) as cluster:
            for fault in args.only:
                print(f"faults: {fault}", file=sys.stderr, flush=True)
                results[fault] = inject(cluster, fault, args.seconds, args.seed)
    except (TandemError, psutil.Error) as error:
        print(f"faults: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("faults: interrupted", file=sys.stderr)
        return 130
    finally:
        if results:
            print_report(make_report(results, args.seconds))
            if args.json is not None:
                args.json.write_text(as_json(args, results), encoding="utf-8")
    return 0


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
