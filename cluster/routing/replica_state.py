"""A router's accounts of one replica and of each request that it placed there."""

import math
from dataclasses import dataclass, field

from cluster.load import Load
from cluster.routing.request import RequestView
from cluster.routing.table import Reach

KV_FULL = 0.95
"""KV cache usage (0 to 1) from which a new request may have to wait until another one ends."""


@dataclass(eq=False, slots=True)
class ReplicaState:
    """Account of one replica; times are in seconds on the fleet's clock."""

    id: str
    row: int
    """Index in the fleet's table; -1 once the replica was removed."""
    capacity: int
    """Requests that the replica may have in flight."""
    reach: Reach
    available: Reach = Reach.NONE
    """The reach, or ``NONE`` while the replica has no room; as in the fleet's table."""
    prefill_token_s: float = 0.0
    """Learned time to compute a prompt token."""
    decode_token_s: float = 0.0
    """Learned time of a completion token of one stream."""
    queue: "dict[Placement, None]" = field(default_factory=dict)
    """Requests without a first token, in the order of their placement."""
    head_since_s: float = 0.0
    """Earliest start of the prefill of the queue's head."""
    last_first_token_s: float = 0.0
    queued_tokens: float = 0.0
    """Expected prefill work of the queue, in tokens."""
    in_flight: int = 0
    """Requests of this router that have not ended."""
    num_decoding: int = 0
    """Requests in flight that have a first token."""
    completion_tokens: float = 0.0
    """Expected completion tokens of all requests in flight."""
    first_token_sum_s: float = 0.0
    """Sum of the first-token times of the requests that decode."""
    others_in_flight: float = 0.0
    """Requests of other routers, by the last load report."""
    others_waiting: float = 0.0
    """Requests of other routers whose prefill has not begun, by the last load report."""
    is_kv_full: bool = False
    kv_full_s: float = -math.inf
    """Last time at which the KV cache was known to be full."""

    def push(self, placement: "Placement") -> None:
        self.in_flight += 1
        self.queued_tokens += placement.work_tokens
        self.completion_tokens += placement.request.completion_tokens
        self.queue[placement] = None

    def begin_decoding(self, placement: "Placement", now_s: float) -> None:
        placement.prefilled_s = now_s
        self.num_decoding += 1
        self.first_token_sum_s += now_s

    def correct_first_token(self, placement: "Placement", now_s: float) -> None:
        """Replace the expected time of a first token by the observed one."""
        assert placement.prefilled_s is not None
        self.first_token_sum_s += now_s - placement.prefilled_s
        placement.prefilled_s = now_s

    def discard(self, placement: "Placement") -> None:
        """Remove an ended request that has left the queue."""
        if placement.prefilled_s is not None:
            self.num_decoding -= 1
            self.first_token_sum_s -= placement.prefilled_s
        self.in_flight -= 1
        self.completion_tokens -= placement.request.completion_tokens
        if self.in_flight == 0:  # clears rounding errors
            self.completion_tokens = self.first_token_sum_s = self.queued_tokens = 0.0

    def update_load(self, load: Load, now_s: float) -> None:
        others = float(load.in_flight - self.in_flight)
        self.others_in_flight = others = min(max(0.0, others), float(self.capacity))
        share = others / max(1.0, self.in_flight + others)
        self.others_waiting = min(max(0.0, load.waiting * share), others)
        was_kv_full, self.is_kv_full = self.is_kv_full, load.kv_cache_usage > KV_FULL
        if was_kv_full or self.is_kv_full:
            self.kv_full_s = now_s


@dataclass(eq=False, slots=True)
class Placement:
    """One request at one replica; made by ``Fleet.place``, ended once by ``Fleet.end``."""

    replica: ReplicaState
    request: RequestView
    cached_tokens: float
    """Prompt tokens that the replica was expected to have cached."""
    work_tokens: float
    """Expected cost of the prefill, in tokens."""
    begun_s: float
    """Earliest start of the prefill: the placement, or the first token of the request before."""
    prefilled_s: float | None = None
    """Time of the first token; the expected time if the first token cannot be observed."""
    is_first_token_seen: bool = False
    is_over: bool = False
    is_judged: bool = False
    """True once the replica's circuit breaker has counted the request."""

    @property
    def met_full_cache(self) -> bool:
        """True if the KV cache was full meanwhile, so that the request may have had to wait."""
        return self.replica.is_kv_full or self.replica.kv_full_s >= self.begun_s
