"""Cost of metrics and tracing: streams with both off, with metrics, and with tracing as well.

One cluster has an application that does not count the requests with a certain header, and one that
exports the spans of every request to a receiver on loopback; each has a router and an instant
engine. Turns of a few seconds alternate, so that a slow phase of the machine affects all of them.
Requests with and without metrics run in the same processes, because two processes that run the same
code differ by more CPU time than metrics cost.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from benchmarks import wrk
from benchmarks.endpoint import Endpoint, TargetError
from benchmarks.metrics import counting
from benchmarks.metrics.uncounted import HEADER
from benchmarks.otlp import SpanCounter, receive_traces
from benchmarks.report import CellValue, Report, Table, print_progress
from benchmarks.rounds import Summary, interleave
from benchmarks.stream.measure import (
    PATH,
    TOKENS,
    StreamResult,
    cpu_cost_table,
    encode_chat,
    measure,
)
from benchmarks.targets.running import SIM_MODEL, RunningTarget, sim_generator
from benchmarks.targets.tandem import ExtraApplication, tandem_with_pools

OFF, ON, TRACED = "off", "metrics", "metrics, tracing"
PATHS: Mapping[str, str] = {OFF: "/switched", ON: "/switched", TRACED: "/traced"}
"""Route prefix of the application that gets the requests."""
_NAME, _UNCOUNTED = HEADER
AGENTS: Mapping[str, str] = {OFF: _UNCOUNTED, ON: "counted", TRACED: "counted"}
"""Value of the header that tells requests apart."""
CONNECTIONS = 32
GOALS = {"ratio_metrics_on_off": ">= 0.98", "metrics_us_per_token": "<= 2"}

Turns = Mapping[str, Sequence[StreamResult]]
"""Results of one round by variant, one per turn."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--turns", type=int, default=6, help="turns of each variant in a round")
    parser.add_argument("--seconds", type=float, default=4.0, help="duration of a turn")


def run(args: argparse.Namespace) -> Report:
    """Measure on a new cluster in each round."""
    wrk.require_wrk()
    if args.quick:
        args.turns, args.seconds = 1, min(args.seconds, 2.0)
    rounds, counting_us, spans = [], [], SpanCounter()
    for number in range(args.rounds):
        counting_us.append(counting.us_per_token())
        with receive_traces(spans.add_export) as url, _cluster(url) as running:
            rounds.append(_run_turns(running, number, args))
    if not spans.count:
        raise TargetError(f"No span arrived in {len(rounds)} rounds with tracing.")
    return _report(rounds, counting_us, spans)


@contextmanager
def _cluster(url: str) -> Iterator[RunningTarget]:
    extra = [
        ExtraApplication(PATHS[OFF], "benchmarks.metrics.uncounted:build", {}),
        # Serve requires distinct import paths; "app.build" is the same function as "app:build".
        ExtraApplication(PATHS[TRACED], "deployments.app.build", {"tracing": {"endpoint": url}}),
    ]
    pools = {"generators": [sim_generator(0.0)]}
    with tandem_with_pools(pools, SIM_MODEL, extra_applications=extra) as running:
        yield running


def _run_turns(running: RunningTarget, number: int, args: argparse.Namespace) -> Turns:
    results: dict[str, list[StreamResult]] = defaultdict(list)
    requests = {name: _encode_request(running.endpoint, name) for name in PATHS}
    sizes = {
        name: wrk.measure_response_bytes(running.endpoint, request, TOKENS)
        for name, request in requests.items()
    }
    for _, name in interleave(list(PATHS), args.turns):
        result = measure(running, requests[name], sizes[name], CONNECTIONS, args.seconds)
        results[name].append(result)
        print_progress(number, name, f"{result.req_s:8.1f} req/s")
    return results


def _encode_request(endpoint: Endpoint, name: str) -> bytes:
    headers = {**endpoint.headers, _NAME: AGENTS[name]}
    return encode_chat(replace(endpoint, headers=headers), PATHS[name] + PATH)


def ratio_to_off(turns: Turns, name: str) -> float:
    """Return the CPU time per token of ``OFF`` over that of ``name``: the median of the turns.

    Rates vary more: they also depend on what else runs and on how the kernel places the threads.
    """
    return _cpu_us(turns[OFF]).over(_cpu_us(turns[name])).median


def _cpu_us(results: Sequence[StreamResult]) -> Summary:
    return Summary(tuple(sum(result.cpu_us_per_token.values()) for result in results))


def _rates(results: Sequence[StreamResult]) -> Summary:
    return Summary(tuple(result.req_s for result in results))


def _report(rounds: Sequence[Turns], counting_us: Sequence[float], spans: SpanCounter) -> Report:
    rows: list[list[CellValue]] = [
        [name, Summary(tuple(_rates(turns[name]).median for turns in rounds))] for name in PATHS
    ]
    costs = {name: [one.cpu_us_per_token for t in rounds for one in t[name]] for name in PATHS}
    return Report(
        keys={
            "ratio_metrics_on_off": Summary(tuple(ratio_to_off(turns, ON) for turns in rounds)),
            "ratio_tracing_on_off": Summary(tuple(ratio_to_off(turns, TRACED) for turns in rounds)),
            "metrics_us_per_token": Summary(tuple(counting_us)),
        },
        goals=GOALS,
        tables=[
            Table(
                f"Streams of {TOKENS} tokens per second, instant engine, {CONNECTIONS} connections",
                ("variant", "req/s"),
                rows,
            ),
            cpu_cost_table("CPU time per token in µs", costs),
        ],
        details={"turns": rounds, "spans": spans.count, "export_bytes": spans.num_bytes},
        notes=[_note(rounds, spans)],
    )


def _note(rounds: Sequence[Turns], spans: SpanCounter) -> str:
    requests = sum(result.load.requests for turns in rounds for result in turns[TRACED])
    return (
        f"{spans.count} spans arrived for {requests} measured requests and those of the warm-ups; "
        "a request without lost spans has four. metrics_us_per_token times the metrics code alone, "
        "in process, with one write per token. The ratios are of CPU time per token in all "
        "processes, of a round the median of its turns. Requests with and without metrics share "
        "the processes."
    )
