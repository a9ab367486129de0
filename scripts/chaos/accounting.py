"""Failures, replaced replicas and outages, computed from the requests around one fault."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Literal

_PROMPT_CHARS = 14
"""Characters that tell the prompts apart."""
Connection = Literal["", "refused", "broken"]
"""Failure of a request's connection, if that was its error."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request of the load. Times are of ``time.monotonic``, which all processes share."""

    kind: str
    began_s: float
    ended_s: float
    served_s: tuple[float, ...] = ()
    """Times at which parts of the response arrived."""
    error: str = ""
    """Short description of the failure; empty if the request succeeded."""
    connection: Connection = ""
    text: str = ""
    """Prompt and answer of a greedy stream."""


def measure(
    kind: str, parts: Iterable[object], describe: Callable[[Exception], tuple[str, Connection]]
) -> Attempt:
    """Send a request by iterating over the parts of its response; ``describe`` its error."""
    began_s = time.monotonic()
    served_s: list[float] = []
    texts: list[str] = []
    failure: tuple[str, Connection] = "", ""
    try:
        for part in parts:
            served_s.append(time.monotonic())
            if isinstance(part, str):
                texts.append(part)
    except Exception as error:
        failure = describe(error)
    text = "".join(texts)
    return Attempt(kind, began_s, time.monotonic(), tuple(served_s), *failure, text)


@dataclass(frozen=True, slots=True)
class Goal:
    """Upper bounds on the results of a fault; None if there is no bound."""

    failed: int | None = None
    restarted: int | None = None
    outage_s: float | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """Time around a fault, under load."""

    began_s: float
    killed_s: float
    gone_s: float
    """Time at which the killed process no longer existed; until then its sockets are open."""
    ended_s: float


@dataclass(frozen=True, slots=True)
class FaultResult:
    """Effect of one fault on clients and replicas."""

    requests: int
    """Requests that ended after the kill."""
    failed: int
    """Failed requests, except those on sockets of the killed process."""
    diverged: int
    """Greedy streams whose text differs from the text before the kill."""
    errors: Mapping[str, int]
    """Failed requests by kind and error."""
    lost: Mapping[str, int]
    """Requests on sockets of the killed process, by kind and error."""
    restarted: int
    """Replicas that were replaced."""
    outage_s: Mapping[str, float]
    """Longest time without any data of a successful response after the kill, by kind."""
    usual_gap_s: Mapping[str, float]
    """The same before the kill."""
    recovered_s: float | None
    """Time from the kill until all deployments were healthy again; None if that took too long."""

    def missed(self, goal: Goal) -> list[str]:
        """Return a description of each missed bound."""
        values = {
            "failed": (self.failed, goal.failed),
            "restarted": (self.restarted, goal.restarted),
            "outage_s": (max(self.outage_s.values(), default=0.0), goal.outage_s),
        }
        missed = [
            f"{name} {value:.3g} > {bound:g}"
            for name, (value, bound) in values.items()
            if bound is not None and value > bound
        ]
        return missed if self.recovered_s is not None else [*missed, "not recovered"]


def longest_gap(moments: Iterable[float], began_s: float, ended_s: float) -> float:
    """Return the longest time between two times without a moment, in seconds."""
    within = sorted(moment for moment in moments if began_s < moment < ended_s)
    return max(b - a for a, b in itertools.pairwise([began_s, *within, ended_s]))


def summarize(
    attempts: Iterable[Attempt],
    window: Window,
    *,
    kinds: Iterable[str],
    served_by_victim: Set[str],
    restarted: int,
    recovered_s: float | None,
) -> FaultResult:
    """Return the result of a fault.

    ``served_by_victim`` are the kinds whose clients' connections end at, or pass through, the
    killed process. Their lost sockets are no failures if the request began before the kill or the
    connection was refused.
    """
    attempts = list(attempts)
    served = {
        kind: [
            moment
            for attempt in attempts
            if attempt.kind == kind
            for moment in attempt.served_s
            # What a client got of a response that failed later is of no use to it. Before the
            # kill it shows that the cluster worked.
            if not attempt.error or moment < window.killed_s
        ]
        for kind in kinds
    }
    affected = [attempt for attempt in attempts if attempt.ended_s > window.killed_s]
    errors: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for attempt in affected:
        if attempt.error:
            is_lost = attempt.kind in served_by_victim and (
                attempt.connection == "refused"
                or (attempt.connection == "broken" and attempt.began_s <= window.gone_s)
            )
            (lost if is_lost else errors)[f"{attempt.kind}: {attempt.error}"] += 1
    return FaultResult(
        requests=len(affected),
        failed=errors.total(),
        diverged=count_diverged(attempts, window.killed_s),
        errors=dict(errors),
        lost=dict(lost),
        restarted=restarted,
        outage_s={
            kind: longest_gap(times, window.killed_s, window.ended_s)
            for kind, times in served.items()
        },
        usual_gap_s={
            kind: longest_gap(times, window.began_s, window.killed_s)
            for kind, times in served.items()
        },
        recovered_s=recovered_s,
    )


def count_diverged(attempts: Iterable[Attempt], killed_s: float) -> int:
    """Return the greedy streams that ended after the kill with a text unlike any before it.

    Streams of a prompt that was not answered before the kill are not counted.
    """
    texts = [(one.text, one.ended_s > killed_s) for one in attempts if one.text and not one.error]
    known = {text for text, is_late in texts if not is_late}
    starts = {text[:_PROMPT_CHARS] for text in known}
    return sum(
        is_late and text not in known and text[:_PROMPT_CHARS] in starts for text, is_late in texts
    )


def count_restarted(before: Mapping[str, str], after: Mapping[str, str]) -> int:
    """Return the number of replaced replicas; both map replica ids to deployments.

    A replica that the autoscaler added or removed was not replaced.
    """
    gone = Counter(before[replica] for replica in before.keys() - after.keys())
    new = Counter(after[replica] for replica in after.keys() - before.keys())
    return (gone & new).total()
