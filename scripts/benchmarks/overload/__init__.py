"""More than a pool can serve: does it go on serving what it can, and everybody a fair part?

Open-loop load at 1 to 5 times the capacity of a paced simulated engine, every request with a
deadline; then a small tenant beside a flood, and two floods of unequal weight.
"""

import argparse
import asyncio

from benchmarks.overload import cluster, inprocess
from benchmarks.overload.outcome import Measured, Result
from benchmarks.overload.scenario import FLOODS, LEVELS, SMALL, Phase, Scenario, numbers
from benchmarks.overload.virtual import virtual_time
from benchmarks.report import Cell, Report, Table
from benchmarks.rounds import Summary

RESULTS: tuple[Result, ...] = ("good", "late", "refused")
GOALS = {"goodput_ratio": ">= 0.95", "fair_share_error": "<= 0.10", "refused_ms_p99": "<= 50"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench overload``."""
    parser.add_argument("--seconds", type=_seconds, default=12.0, help="of load at each level")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--in-process", action="store_true", help="no Ray: gateway, link, engine")
    where.add_argument(
        "--virtual-time",
        action="store_true",
        help="the same under a clock that jumps: what decides, without the machine; seconds",
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not Scenario().warm_up_s < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"above {Scenario().warm_up_s:g} (the warm-up), to 3600")
    return seconds


def run(args: argparse.Namespace) -> Report:
    """Measure."""
    scenario = Scenario(seconds=4.0 if args.quick else args.seconds)
    if not args.virtual_time:
        print(f"{args.rounds} x {scenario.most_s:.0f} s at most, and the start", flush=True)
    rounds = []
    for number in range(args.rounds):
        measured = _round(args, scenario, number)
        rounds.append(measured)
        print(f"round {number + 1}: {numbers(scenario, measured)}", flush=True)
    return _report(scenario, rounds)


def _round(args: argparse.Namespace, scenario: Scenario, seed: int) -> dict[Phase, Measured]:
    if args.virtual_time:
        with virtual_time() as runner:
            return runner.run(scenario.run(inprocess.running(), seed))
    made = inprocess.running() if args.in_process else cluster.running()
    return asyncio.run(scenario.run(made, seed))


def _report(scenario: Scenario, rounds: list[dict[Phase, Measured]]) -> Report:
    found = [numbers(scenario, measured) for measured in rounds]
    keys = {name: Summary(tuple(one[name] for one in found)) for name in found[0]}
    rows: list[list[Cell]] = []
    for phase in (*LEVELS, SMALL, FLOODS):
        of_phase = [measured[phase] for measured in rounds]
        rows.append(
            [
                phase.name,
                *(Summary(tuple(scenario.rate(m, result) for m in of_phase)) for result in RESULTS),
            ]
        )
    return Report(
        keys=keys,
        goals=GOALS,
        tables=[
            Table(
                f"Tokens a second; the engine can make {scenario.capacity:.0f}",
                ("load", "in time", "too late", "refused"),
                rows,
            )
        ],
        details={"numbers": found},
        notes=[
            f"open loop, Poisson arrivals, {scenario.seconds:g} s each, the first "
            f"{scenario.warm_up_s:g} s not counted; a deadline of {scenario.deadline_s:g} s",
            "stalled_share: of the time, at worst, in which the load's process did not run; above "
            "0.01 the machine was busy with other things, and a paced engine loses that time",
        ],
    )
