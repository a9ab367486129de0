"""Goodput and fairness when clients send more than a pool can serve.

Open-loop load at 1 to 5 times the capacity of a paced simulated engine, with a deadline for every
request; then a small tenant while another one floods the pool, two floods of unequal weight, and
the small tenant alone.
"""

import argparse
import asyncio

from benchmarks.overload import servers
from benchmarks.overload.scenario import (
    ALONE,
    FLOODS,
    LEVELS,
    SMALL,
    Outcome,
    Phase,
    PhaseResult,
    Scenario,
    compute_keys,
)
from benchmarks.overload.virtual_time import virtual_time
from benchmarks.report import CellValue, Report, Table
from benchmarks.rounds import Summary

OUTCOMES: tuple[Outcome, ...] = ("good", "late", "refused")
GOALS = {
    "goodput_ratio": ">= 0.95",
    "fair_share_error": "<= 0.10",
    "refused_ms_p99": "<= 50",
    "victim_ttft_p99_ratio": "<= 1.5",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds", type=_seconds, default=12.0, help="duration of each phase of the load"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--in-process", action="store_true", help="gateway, link and engine without Ray"
    )
    where.add_argument(
        "--virtual-time",
        action="store_true",
        help="--in-process on a simulated clock: takes seconds, independent of the machine",
    )


def _seconds(text: str) -> float:
    seconds, warm_up_s = float(text), Scenario().warm_up_s
    if not warm_up_s < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"must be above {warm_up_s:g} (the warm-up), at most 3600")
    return seconds


def run(args: argparse.Namespace) -> Report:
    scenario = Scenario(seconds=4.0 if args.quick else args.seconds)
    if not args.virtual_time:
        print(f"{args.rounds} x at most {scenario.max_round_s:.0f} s, plus start-up", flush=True)
    rounds = []
    for number in range(args.rounds):
        results = _run_round(args, scenario, number)
        rounds.append(results)
        print(f"round {number + 1}: {compute_keys(scenario, results)}", flush=True)
    return _report(scenario, rounds)


def _run_round(args: argparse.Namespace, scenario: Scenario, seed: int) -> dict[Phase, PhaseResult]:
    if args.virtual_time:
        with virtual_time() as runner:
            return runner.run(scenario.run(servers.in_process(), seed))
    server = servers.in_process() if args.in_process else servers.full_cluster()
    return asyncio.run(scenario.run(server, seed))


def _report(scenario: Scenario, rounds: list[dict[Phase, PhaseResult]]) -> Report:
    values = [compute_keys(scenario, results) for results in rounds]
    rows: list[list[CellValue]] = []
    for phase in (*LEVELS, SMALL, FLOODS, ALONE):
        results = [of_round[phase] for of_round in rounds]
        rates = (Summary(tuple(scenario.rate(r, outcome) for r in results)) for outcome in OUTCOMES)
        rows.append([phase.name, *rates])
    return Report(
        keys={name: Summary(tuple(one[name] for one in values)) for name in values[0]},
        goals=GOALS,
        tables=[
            Table(
                f"Tokens per second; the engine's capacity is {scenario.capacity:.0f}",
                ("load", "in time", "too late", "shed"),
                rows,
            )
        ],
        details={"numbers": values},
        notes=[
            f"Open loop, Poisson arrivals, {scenario.seconds:g} s per phase, of which the first "
            f"{scenario.warm_up_s:g} s do not count; a deadline of {scenario.deadline_s:g} s.",
            "stalled_share: largest share of the time in which the client's event loop did not "
            "run. Above 0.01 the machine was busy, and the paced engine lost that time, too.",
        ],
    )
