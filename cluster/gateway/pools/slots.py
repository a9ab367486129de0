"""A request's claim on a pool, and the slot that it gets at one of the replicas."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from cluster.admission import OPEN, Identity
from cluster.gateway.pools.replica import Replica
from cluster.routing import Fingerprint, Placement, RequestView
from cluster.routing.fingerprint import EMPTY_FINGERPRINT
from cluster.routing.request import UNKNOWN_REQUEST
from cluster.usage import Usage


@dataclass(frozen=True, slots=True)
class Claim:
    """One request's demand on its pool. Times are on the event loop's clock, in seconds."""

    identity: Identity = OPEN
    work_tokens: float = 1.0
    """Estimated tokens to compute."""
    body_bytes: int = 0
    priority: int = 0
    expires_s: float = float("inf")
    """Time until which the request may wait for a slot."""
    deadline_s: float = float("inf")
    """Time by which the client needs the whole response; infinite if it set no timeout."""
    view: RequestView = UNKNOWN_REQUEST
    """Input of the routing policy."""
    prompt: Fingerprint = EMPTY_FINGERPRINT
    adapter: str | None = None
    """LoRA adapter that the request names; only replicas that serve it can answer."""

    is_retry: bool = False
    """True if its replica was lost: it had its turn already, so it goes first."""

    joins: str | None = None
    """Replica with the answer to an earlier request with the same idempotency key. The claim needs
    no room there."""
    resume_key: str | None = None
    """Set if the replica must continue an answer: the key that it needs."""
    is_move: bool = False
    """True if the request still runs where it is; a replica that routing avoids is no better."""
    excluded: frozenset[str] = frozenset()
    """Replicas that failed with this request, or have it already."""

    @property
    def has_deadline(self) -> bool:
        """True if the client set a timeout."""
        return self.deadline_s < float("inf")


@dataclass(frozen=True, slots=True)
class Slot:
    """A request's slot at a replica; give it back with ``AdmissionQueue.release_slot``."""

    replica: Replica
    placement: Placement
    """Routing's record of the request."""
    claim: Claim
    since_s: float
    """Time at which the slot was taken (monotonic clock)."""
    is_charged: bool = False
    """True if the tenant was charged with the estimated work, which happens while requests wait."""


class EngineSlots(NamedTuple):
    """Requests that the engines of a pool can run at the same time."""

    total: int
    free: int
    """Slots that no request of any router has; below 0 if some wait in the engines."""


class SlotSource(Protocol):
    """Source of an admission queue's slots: the replicas of a pool, or a test's engine."""

    @property
    def num_ready(self) -> int:
        """Number of replicas that can take requests."""

    @property
    def has_room(self) -> bool:
        """True if a replica can take a request of any kind now."""

    def engine_slots(self) -> EngineSlots | None:
        """Return the slots of the engines; None if one does not report them."""

    def take_slot(self, claim: Claim) -> Slot | None:
        """Take a slot, or return None if no replica has room.

        Raises:
            UnavailableError: No replica can serve this request, however long it waits.
        """

    def take_slot_at(self, replica_id: str, claim: Claim) -> Slot | None:
        """Take a slot at this replica even if it is full; return None if it is gone."""

    def release_slot(self, slot: Slot, usage: Usage | None) -> float:
        """Release a slot and return the seconds for which it was taken."""
