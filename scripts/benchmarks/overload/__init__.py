"""More than a pool can serve: does it go on serving what it can, and everybody a fair part?

Open-loop load at 1 to 5 times the capacity of a paced simulated engine, every request with a
deadline; then a small tenant beside a flood, and two floods of unequal weight.
"""

import argparse
import asyncio

from benchmarks.overload import cluster, inprocess
from benchmarks.overload.outcome import Outcome, Result
from benchmarks.overload.scenario import FLOODS, LEVELS, SMALL, Phase, Scenario, numbers
from benchmarks.report import Cell, Report, Table
from benchmarks.rounds import Summary

RESULTS: tuple[Result, ...] = ("good", "late", "refused")
GOALS = {"goodput_ratio": ">= 0.95", "fair_share_error": "<= 0.10", "refused_ms_p99": "<= 50"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench overload``."""
    parser.add_argument("--seconds", type=float, default=12.0, help="of load at each level")
    parser.add_argument("--in-process", action="store_true", help="no Ray: gateway, link, engine")


def run(args: argparse.Namespace) -> Report:
    """Measure."""
    scenario = Scenario(seconds=4.0 if args.quick else args.seconds)
    rounds = []
    for number in range(args.rounds):
        made = inprocess.running() if args.in_process else cluster.running()
        outcomes = asyncio.run(scenario.run(made, seed=number))
        rounds.append(outcomes)
        print(f"round {number + 1}: {numbers(scenario, outcomes)}", flush=True)
    return _report(scenario, rounds)


def _report(scenario: Scenario, rounds: list[dict[Phase, list[Outcome]]]) -> Report:
    found = [numbers(scenario, outcomes) for outcomes in rounds]
    keys = {name: Summary(tuple(one[name] for one in found)) for name in found[0]}
    rows: list[list[Cell]] = []
    for phase in (*LEVELS, SMALL, FLOODS):
        of_phase = [outcomes[phase] for outcomes in rounds]
        rows.append(
            [
                phase.name,
                *(Summary(tuple(scenario.rate(o, result) for o in of_phase)) for result in RESULTS),
            ]
        )
    return Report(
        keys=keys,
        goals=GOALS,
        tables=[
            Table(
                f"Requests a second; the engine can do {scenario.capacity_rps:.0f}",
                ("load", "in time", "too late", "refused"),
                rows,
            )
        ],
        details={"numbers": found},
        notes=[
            f"open loop, Poisson arrivals, {scenario.seconds:g} s each, the first "
            f"{scenario.warm_up_s:g} s not counted; a deadline of {scenario.deadline_s:g} s"
        ],
    )
