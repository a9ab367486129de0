"""What one router tells of itself: to the page that it serves, and to the other routers."""

from collections.abc import Mapping

import msgspec

from cluster.gateway.recording.request_log import Failure
from cluster.metrics import table

LATENCIES: Mapping[str, table.Metric] = {
    "ttft": table.TTFT_SECONDS,
    "itl": table.ITL_SECONDS,
    "total": table.REQUEST_SECONDS,
    "queue": table.QUEUE_SECONDS,
}
"""The histograms whose percentiles are shown, by the names that they have there."""


class PoolSecond(msgspec.Struct, omit_defaults=True):
    """One second of one pool, as one router saw it."""

    requests: int = 0
    """That ended, in whatever way."""
    failed: int = 0
    """With a status of 500 or more, or cut off."""
    refused: int = 0
    """With a status of 400 to 498."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latencies: dict[str, dict[int, int]] = msgspec.field(default_factory=dict)
    """Of each of ``LATENCIES``, the observations by the index of their bucket."""
    ongoing: int = 0
    """This router's own, at the end of the second; the same for ``queued``."""
    queued: int = 0
    running: int = 0
    """In the engines, whichever router they came from; the same for the rest."""
    waiting: int = 0
    kv_cache: float = 0.0


class Second(msgspec.Struct):
    """One second of one router."""

    time: int
    """Unix time of its beginning."""
    span_s: float
    """How long it really was."""
    pools: dict[str, PoolSecond]
    unrouted: int = 0
    """Requests that were refused before they came to a pool: no such model, no key."""


class ReplicaNow(msgspec.Struct):
    """A replica as a router sees it now."""

    id: str
    state: str
    ongoing: int
    """Requests of that router."""
    running: int = 0
    waiting: int = 0
    kv_cache: float = 0.0


class PoolNow(msgspec.Struct):
    """A pool as a router sees it now."""

    kind: str
    replicas: list[ReplicaNow]
    queued: int = 0
    """In that router."""

    def level(self) -> PoolSecond:
        """The levels of this moment, which are all of its replicas' together."""
        return PoolSecond(
            ongoing=sum(replica.ongoing for replica in self.replicas),
            queued=self.queued,
            running=sum(replica.running for replica in self.replicas),
            waiting=sum(replica.waiting for replica in self.replicas),
            kv_cache=sum(replica.kv_cache for replica in self.replicas)
            / max(1, len(self.replicas)),
        )


class Change(msgspec.Struct):
    """The replicas of a pool became more or fewer, or were replaced."""

    time: float
    """Unix time."""
    model: str
    added: list[str]
    """Ids of replicas; the same for ``removed``."""
    removed: list[str]
    replicas: int
    """How many there are then."""


class Report(msgspec.Struct):
    """Everything that one router tells."""

    router: str
    seconds: list[Second]
    pools: dict[str, PoolNow]
    failures: list[Failure]
    changes: list[Change]
