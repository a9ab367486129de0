"""Streams per second of each server when the engine itself takes no time."""

import argparse
from collections import defaultdict
from collections.abc import Callable

from benchmarks import wrk
from benchmarks.report import CellValue, Report, Table, print_progress
from benchmarks.rounds import Summary, interleave
from benchmarks.stream.measure import TOKENS, StreamResult, cpu_cost_table, encode_chat, measure
from benchmarks.stream.targets import (
    BARE,
    CLUSTER,
    NO_HANDOVER,
    SERVE_DEFAULT,
    SERVE_HANDLE,
    TARGETS,
    VLLM_ROUTER,
)

HEADLINE = 32
"""Connections of the keys without a suffix."""

RATIOS = {
    "ratio_vs_bare": (BARE, 1.0),
    "ratio_vs_serve_handle": (SERVE_HANDLE, 6.0),
    "ratio_vs_serve_default": (SERVE_DEFAULT, 30.0),
    "ratio_vs_vllm_router": (VLLM_ROUTER, 1.0),
    "ratio_vs_no_handover": (NO_HANDOVER, 0.97),
}
"""Peer and goal of each ratio."""

Results = dict[tuple[str, int], list[StreamResult]]
"""One result per round, by server and number of connections."""


def run(args: argparse.Namespace) -> Report:
    results: Results = defaultdict(list)
    commands: dict[str, str] = {}
    for number, name in interleave(args.targets, args.rounds):
        with TARGETS[name](0.0) as running:
            commands[name] = running.command
            request = encode_chat(running.endpoint)
            size = wrk.measure_response_bytes(running.endpoint, request, TOKENS)
            for connections in args.connections:
                result = measure(running, request, size, connections, args.seconds)
                results[name, connections].append(result)
                print_progress(
                    number, name, f"{connections:>4} connections {result.req_s:8.1f} req/s"
                )
    return _report(results, commands, args.connections)


def _report(results: Results, commands: dict[str, str], connections: list[int]) -> Report:
    keys: dict[str, Summary] = {}
    for number in sorted(connections, key=lambda number: number != HEADLINE):
        suffix = "" if number == HEADLINE else f"_at_{number}"
        keys |= {f"{name}{suffix}": value for name, value in _keys(results, number).items()}
    return Report(
        commands=commands,
        keys=keys,
        goals={key: f">= {goal:g}" for key, (_, goal) in RATIOS.items() if key in keys},
        tables=[
            _rate_table(results, connections),
            _latency_table(results, connections),
            *(_cpu_table(results, number) for number in connections),
        ],
        details={"instant": {f"{name} at {n}": rounds for (name, n), rounds in results.items()}},
        notes=[_note(results)],
    )


def _summary(rounds: list[StreamResult], value: Callable[[StreamResult], float]) -> Summary:
    return Summary(tuple(map(value, rounds)))


def _rate(result: StreamResult) -> float:
    return result.req_s


def _total_cpu_us(result: StreamResult) -> float:
    return sum(result.cpu_us_per_token.values())


def _keys(results: Results, connections: int) -> dict[str, Summary]:
    ours = results.get((CLUSTER, connections))
    if not ours:
        return {}
    keys = {"router_req_s": _summary(ours, _rate)}
    for key, (peer, _) in RATIOS.items():
        if theirs := results.get((peer, connections)):
            keys[key] = _summary(ours, _rate).over(_summary(theirs, _rate))
    return {**keys, "cpu_us_per_token": _summary(ours, _total_cpu_us)}


def _rate_table(results: Results, connections: list[int]) -> Table:
    names = dict.fromkeys(name for name, _ in results)
    rows: list[list[CellValue]] = [
        [name, *(_summary(results[name, n], _rate) for n in connections)] for name in names
    ]
    columns = ("server", *(f"{number} connections" for number in connections))
    return Table(f"Streams of {TOKENS} tokens per second, instant engine", columns, rows)


def _latency_table(results: Results, connections: list[int]) -> Table:
    names = dict.fromkeys(name for name, _ in results)
    rows: list[list[CellValue]] = [
        [name, *(_summary(results[name, n], value) for n in connections for value in (_p50, _p99))]
        for name in names
    ]
    columns = [f"{number}: {quantile}" for number in connections for quantile in ("p50", "p99")]
    return Table("Latency of a complete stream in ms", ("server", *columns), rows)


def _p50(result: StreamResult) -> float:
    return result.load.p50_ms


def _p99(result: StreamResult) -> float:
    return result.load.p99_ms


def _cpu_table(results: Results, connections: int) -> Table:
    title = f"CPU time per token in µs, instant engine, {connections} connections"
    return cpu_cost_table(
        title,
        {
            name: [result.cpu_us_per_token for result in rounds]
            for (name, number), rounds in results.items()
            if number == connections
        },
    )


def _note(results: Results) -> str:
    shares = [result.client_share for rounds in results.values() for result in rounds]
    return (
        f"The load is wrk with one thread, which used {min(shares):.0%} to {max(shares):.0%} of a "
        "core. The servers ran one at a time. The cluster required an API key."
    )
