"""Failures, divergence and recovery around each fault, computed from the answers of all clients."""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

NUM_WAITS = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """One request of a client, with its repetitions. Times are of ``time.monotonic``."""

    client: str
    began_s: float
    ended_s: float
    data_s: tuple[float, ...] = ()
    """Times at which parts of the answer arrived."""
    error: str = ""
    """Short description of the failure; empty if the request succeeded."""
    broken_s: tuple[float, ...] = ()
    """Times at which a connection was refused or broke, or a router was lost before it answered.
    The request was sent again."""
    diverged: bool = False
    """True if a greedy answer differs from that of an undisturbed run."""


@dataclass(frozen=True, slots=True)
class Window:
    """Time around a fault, under load."""

    hit_s: float
    healthy_s: float
    """Time of the recovery."""
    ended_s: float
    """Time of the next fault."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Time for which a client got no data."""

    client: str
    after_s: float
    """Time from the fault to its begin."""
    wait_s: float


@dataclass(frozen=True, slots=True)
class Target:
    """Bounds on the results of a fault. No answer may diverge."""

    recovery_s: float | None = 2.0
    """Longest wait of a client for its next data; None if there is no bound."""
    max_failed: int = 0
    """Requests that may fail."""
    may_break_ingress: bool = False
    """True if sockets of clients may break; the repeated requests must succeed."""


@dataclass(frozen=True, slots=True)
class FaultResult:
    """Effect of one fault on clients and replicas."""

    requests: int
    """Requests that ended after the fault and before the next one."""
    failed: int
    diverged: int
    broken_at_ingress: int
    """Broken or refused sockets of clients."""
    recovery_s: float
    """Longest time for which a client waited for its next data."""
    waits: Sequence[Wait]
    """Longest waits, of ``NUM_WAITS`` clients."""
    usual_gap_s: float
    """Longest wait before the fault."""
    restarted: int
    """Replicas that were replaced."""
    errors: Mapping[str, int]
    """Failed requests by client kind and error."""
    healthy_s: float | None = None
    """Time from the fault until all deployments were healthy again; None if that took too long."""

    def missed(self, target: Target) -> list[str]:
        """Return a description of each missed target."""
        missed = []
        if self.failed > target.max_failed:
            missed.append(f"failed {self.failed} > {target.max_failed}")
        if self.diverged:
            missed.append(f"diverged {self.diverged} > 0")
        if self.broken_at_ingress and not target.may_break_ingress:
            missed.append(f"broken_at_ingress {self.broken_at_ingress} > 0")
        if target.recovery_s is not None and self.recovery_s > target.recovery_s:
            missed.append(f"recovery_s {self.recovery_s:.2f} > {target.recovery_s:g}")
        return missed if self.healthy_s is not None else [*missed, "not healthy again"]


def kind_of(client: str) -> str:
    """Return the kind of a client, which its name begins with: ``greedy`` of ``greedy-7``."""
    return client.partition("-")[0]


def longest_waits(answers: Iterable[Answer], began_s: float, ended_s: float) -> list[Wait]:
    """Return the longest time for which each client got no data between two times.

    The longest one is first. A client that pauses after an answer does not wait, and an answer that
    fails within the time gives no data.
    """
    longest: dict[str, Wait] = {}
    for answer in answers:
        data_s = () if answer.error and answer.ended_s <= ended_s else answer.data_s
        for begin, end in itertools.pairwise((answer.began_s, *data_s, answer.ended_s)):
            if end > began_s and begin < ended_s:
                begin_s = max(begin, began_s)
                wait = Wait(answer.client, begin_s - began_s, min(end, ended_s) - begin_s)
                if wait.wait_s >= longest.get(answer.client, wait).wait_s:
                    longest[answer.client] = wait
    return sorted(longest.values(), key=lambda wait: -wait.wait_s)


def summarize(
    answers: Iterable[Answer],
    window: Window,
    *,
    before_s: float,
    restarted: int,
    healthy_s: float | None,
) -> FaultResult:
    """Return the result of a fault; the usual gaps are those since ``before_s``."""
    answers = list(answers)
    ended = [one for one in answers if window.hit_s < one.ended_s <= window.ended_s]
    # The slow reader waits by itself.
    prompt = [one for one in answers if kind_of(one.client) != "slow"]
    waits = longest_waits(prompt, window.hit_s, window.healthy_s)
    usual = longest_waits(prompt, before_s, window.hit_s)
    errors = Counter(f"{kind_of(one.client)}: {one.error}" for one in ended if one.error)
    return FaultResult(
        requests=len(ended),
        failed=errors.total(),
        diverged=sum(one.diverged for one in ended),
        broken_at_ingress=sum(
            window.hit_s < broken_s <= window.ended_s
            for one in answers
            for broken_s in one.broken_s
        ),
        recovery_s=waits[0].wait_s if waits else 0.0,
        waits=waits[:NUM_WAITS],
        usual_gap_s=usual[0].wait_s if usual else 0.0,
        restarted=restarted,
        errors=dict(errors),
        healthy_s=healthy_s,
    )


def totals(results: Iterable[FaultResult], targets: Iterable[Target]) -> dict[str, Any]:
    """Return the keys of a run; recovery counts for faults with a bound on it."""
    results = list(results)
    bounded = [
        result.recovery_s
        for result, target in zip(results, targets, strict=True)
        if target.recovery_s is not None
    ]
    counts = ("requests", "failed", "diverged", "broken_at_ingress", "restarted")
    return {
        **{name: sum(getattr(result, name) for result in results) for name in counts},
        "recovery_s_p50": statistics.median(bounded) if bounded else 0.0,
        "recovery_s_max": max(bounded, default=0.0),
    }


def count_restarted(before: Mapping[str, str], after: Mapping[str, str]) -> int:
    """Return the number of replaced replicas; both map replica ids to deployments.

    A replica that was added or removed by scaling was not replaced.
    """
    gone = Counter(before[replica] for replica in before.keys() - after.keys())
    new = Counter(after[replica] for replica in after.keys() - before.keys())
    return (gone & new).total()


def as_json(result: FaultResult, target: Target) -> dict[str, Any]:
    return {**asdict(result), "target": asdict(target), "missed": result.missed(target)}
