"""Report of one quantity of the cluster and of its peer, by round."""

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.report import Report, Table
from benchmarks.rounds import Summary
from benchmarks.stream.targets import CLUSTER, VLLM_ROUTER

PEERS = {CLUSTER: "ours", VLLM_ROUTER: "tuned"}
Values = Mapping[str, Sequence[float | None]]
"""One value per round, by server; None if it was not measured."""


def pair_report(
    key: str, goal: str, value: str, title: str, results: Values, commands: Mapping[str, str]
) -> Report:
    """Return a report with the ratio ``key`` and the quantity ``value`` of both servers."""
    ratio = _ratio(results)
    rows = [(name, summary(found)) for name, found in results.items()]
    sides = {PEERS[name]: summary(found) for name, found in results.items()}
    return Report(
        keys={} if ratio is None else {key: ratio},
        goals={} if ratio is None else {key: goal},
        tables=[Table(title, ("server", "value"), rows)],
        details={value: results},
        commands=dict(commands),
        values={value: {side: found for side, found in sides.items() if found is not None}},
    )


def summary(values: Iterable[float | None]) -> Summary | None:
    """Return the rounds that were measured; None if there are none."""
    measured = tuple(value for value in values if value is not None)
    return Summary(measured) if measured else None


def _ratio(results: Values) -> Summary | None:
    """Return our value over the peer's in the rounds that measured both."""
    pairs = zip(results.get(CLUSTER, ()), results.get(VLLM_ROUTER, ()), strict=False)
    return summary(None if a is None or b is None else a / b for a, b in pairs)
