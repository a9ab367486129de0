"""The cost of metrics and of tracing: streams with both off, with metrics, with tracing too.

One cluster has three applications, each with a router and an instant engine of its own: one that
counts nothing, the usual one, and one that sends the spans of every request to a receiver on
loopback. They take turns of a few seconds, so that what slows the machine slows all of them.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from benchmarks import load, otlp
from benchmarks.endpoint import TargetError
from benchmarks.metrics import counting
from benchmarks.metrics.spans import Spans
from benchmarks.metrics.uncounted import ARGS
from benchmarks.report import Cell as ReportCell
from benchmarks.report import Report, Table
from benchmarks.rounds import Summary, interleaved
from benchmarks.stream.cell import PATH, TOKENS, Cell, chat, measure
from benchmarks.stream.costs import cost_table
from benchmarks.stream.paths import say
from benchmarks.targets.running import MODEL, Running, generator
from benchmarks.targets.tandem import Beside, tandem_of

OFF, ON, TRACED = "off", "metrics", "metrics, tracing"
PATHS: Mapping[str, str] = {OFF: "/off", ON: "", TRACED: "/traced"}
"""Where each application answers."""
CONNECTIONS = 32
GOALS = {"ratio_metrics_on_off": ">= 0.98", "metrics_us_per_token": "<= 2"}

Turns = Mapping[str, Sequence[Cell]]
"""Of each application in one round, in their order."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench metrics``."""
    parser.add_argument("--turns", type=int, default=5, help="of each application in a round")
    parser.add_argument("--seconds", type=float, default=4.0, help="of load in each turn")


def run(args: argparse.Namespace) -> Report:
    """Measure in a fresh cluster in each round."""
    load.require_wrk()
    if args.quick:
        args.turns, args.seconds = 1, min(args.seconds, 2.0)
    rounds, counted, spans = [], [], Spans()
    for number in range(args.rounds):
        counted.append(counting.us_per_token())
        with otlp.receive(spans.take) as url, _cluster(url) as running:
            rounds.append(_turns(running, number, args))
    _check(spans, rounds)
    return _report(rounds, counted, spans)


@contextmanager
def _cluster(url: str) -> Iterator[Running]:
    beside = [
        Beside(PATHS[OFF], "benchmarks.metrics.uncounted:build", ARGS),
        # The usual import path is taken; Serve takes this spelling, too.
        Beside(PATHS[TRACED], "deployments.app.build", {"tracing": {"endpoint": url}}),
    ]
    with tandem_of({"generators": [generator(0.0)]}, MODEL, beside=beside) as running:
        yield running


def _turns(running: Running, number: int, args: argparse.Namespace) -> Turns:
    cells: dict[str, list[Cell]] = defaultdict(list)
    requests = {name: chat(running.endpoint, path + PATH) for name, path in PATHS.items()}
    sizes = {
        name: load.answer_size(running.endpoint, request, TOKENS)
        for name, request in requests.items()
    }
    for _, name in interleaved(list(PATHS), args.turns):
        cell = measure(running, requests[name], sizes[name], CONNECTIONS, args.seconds)
        cells[name].append(cell)
        say(number, name, f"{cell.req_s:8.1f} req/s")
    return cells


def _check(spans: Spans, rounds: Sequence[Turns]) -> None:
    if not spans.count:
        raise TargetError(f"no span came of {len(rounds)} rounds with tracing")


def ratio(turns: Turns, name: str) -> float:
    """The median over the turns of one round of ``name``'s rate to that with everything off."""
    return _rates(turns[name]).over(_rates(turns[OFF])).median


def _rates(cells: Sequence[Cell]) -> Summary:
    return Summary(tuple(cell.req_s for cell in cells))


def _report(rounds: Sequence[Turns], counted: Sequence[float], spans: Spans) -> Report:
    rows: list[list[ReportCell]] = [
        [name, Summary(tuple(_rates(turns[name]).median for turns in rounds))] for name in PATHS
    ]
    costs = {name: [cell.cpu_us_per_token for t in rounds for cell in t[name]] for name in PATHS}
    return Report(
        keys={
            "ratio_metrics_on_off": Summary(tuple(ratio(turns, ON) for turns in rounds)),
            "ratio_tracing_on_off": Summary(tuple(ratio(turns, TRACED) for turns in rounds)),
            "metrics_us_per_token": Summary(tuple(counted)),
        },
        goals=GOALS,
        tables=[
            Table(
                f"Streams of {TOKENS} tokens a second, instant engine, {CONNECTIONS} connections",
                ("application", "req/s"),
                rows,
            ),
            cost_table("CPU us for a token", costs),
        ],
        details={"turns": rounds, "spans": spans.count, "export_bytes": spans.num_bytes},
        notes=[_note(rounds, spans)],
    )


def _note(rounds: Sequence[Turns], spans: Spans) -> str:
    requests = sum(cell.load.requests for turns in rounds for cell in turns[TRACED])
    return (
        f"{spans.count} spans came for {requests} measured requests and those of the warm-ups, "
        "four for each that loses none; metrics_us_per_token is of the counting functions in "
        "process, one write a token; a round's ratio is the median of its turns'"
    )
