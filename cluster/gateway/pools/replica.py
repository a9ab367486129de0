"""One replica as a router sees it: its address, its link, and the fallback without a link."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from ssl import SSLContext
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from cluster.link import Adapters, LinkClient, LinkState, RequestHead, ResponseHead
from cluster.link.frames import JOURNAL_FORMAT
from cluster.routing import Reach
from cluster.usage import Usage

if TYPE_CHECKING:
    from cluster.gateway.pools.slots import Claim, Slot

REPLICA_DRAIN_PATH = "/internal/drain"
"""Path at which a replica drains itself; only links reach it."""
FALLBACK_AFTER = 2
"""Failed attempts to open a link before requests go through the fallback."""


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """A running replica, as it describes itself to Ray Serve."""

    id: str
    host: str
    port: int
    routes: tuple[str, ...] = ()
    """Paths that its engine serves."""
    versions: dict[str, str] = field(default_factory=dict)
    adapters: tuple[str, ...] | None = ()
    """LoRA adapters that its engine served at its start. None if unknown (older versions); it may
    then have all of them."""
    reports_adapters: bool = False
    """True if the replica tells routers over the link which adapters it serves."""

    resume_key: str = ""
    """Replicas with the same key can continue each other's answers; empty if this one cannot."""
    journal_format: int = JOURNAL_FORMAT
    """Format of its JOURNAL frames; 1 in older versions."""
    keeps_answers: bool = False
    """True if the replica keeps answers to requests with an idempotency key."""
    context_tokens: int | None = None
    """Longest prompt and completion of the model together; None if unknown or unlimited."""
    node_id: str = ""
    """Ray's id of its node, which the router adds; empty if unknown."""

    def lacks_adapter(self, adapter: str) -> bool:
        """Return True if the replica is known not to have served the adapter at its start."""
        return self.adapters is not None and adapter not in self.adapters

    def to_metadata(self) -> dict[str, Any]:
        """Return the form that Ray Serve passes to the routers."""
        metadata: dict[str, Any] = msgspec.to_builtins(self)
        del metadata["id"], metadata["node_id"]
        return metadata

    @classmethod
    def from_metadata(
        cls, replica_id: str, metadata: dict[str, Any], node_id: str = ""
    ) -> "ReplicaInfo":
        """Return the inverse of ``to_metadata``.

        Raises:
            msgspec.ValidationError: The replica did not describe itself.
        """
        fields = {**_OLDER, **metadata, "id": replica_id, "node_id": node_id}
        return msgspec.convert(fields, cls)


_OLDER = {"adapters": None, "journal_format": 1}
"""Meaning of the metadata of older versions, which lack these fields."""


class Answer(Protocol):
    """An open request at a replica, over its link or through the fallback."""

    @property
    def usage(self) -> Usage | None:
        """Usage of the request; None before its end, or if the application counts no tokens."""

    async def head(self) -> ResponseHead:
        """Wait for the head of the response.

        Raises:
            LinkError: The replica was lost or refused the request.
            RequestError: The replica answered with an error.
        """

    async def read(self) -> bytes:
        """Return all bytes that have arrived, waiting only if there are none; b"" at the end."""

    def cancel(self) -> None:
        """Stop the work on the replica; may be called at any time and more than once."""


Opener = Callable[[RequestHead, bytes], Answer]
"""Sends a request to one replica; raises LinkClosedError if it cannot be reached."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """Parameters for reaching the replicas of one pool."""

    secret: bytes
    """Shared secret of the link's handshake."""
    ssl: SSLContext | None = None
    fallback: Callable[[str], Opener] | None = None
    """Returns, for a replica's id, the opener used when no link can be opened."""


class Movable(Protocol):
    """An answer that can move to another replica."""

    def move_claim(self) -> "Claim | None":
        """Return the claim for a slot at another replica; None if the answer cannot move."""

    def move_to(self, slot: "Slot") -> bool:
        """Move to this slot; return False if the answer does not need it any more."""


class Replica:
    """One replica with its link."""

    def __init__(self, info: ReplicaInfo, link: LinkClient, fallback: Opener | None) -> None:
        self.info = info
        self.link = link
        self._fallback = fallback
        self.in_flight = 0
        """Requests that this router sent to it and that have not ended."""
        self.num_elsewhere = 0
        """Requests of other routers that it has, by its last report."""
        self.newest_request = ""
        """Id of the request that this router sent to it last."""
        self.movable: set[Movable] = set()
        """Answers of this replica that another one can continue, and requests without any yet."""
        self.mover: asyncio.Task[None] | None = None
        """Moves these answers while the replica drains or is silent, until there are none."""
        self.answer_ids: set[bytes] = set()
        """Ids of the answers that the replica keeps."""
        self.adapters: Adapters | None = None
        """LoRA adapters that the replica reports; None until it has."""
        self.is_retired = False
        """True once Ray Serve no longer lists the replica as running."""
        self.is_open = False
        """True while the link is open and the replica does not drain."""
        self.is_leaving = False
        """True while its node drains."""

    @property
    def state(self) -> Literal["linked", "fallback", "unlinked"]:
        """Connectivity: over its link, through the fallback only, or not at all."""
        if self.link.connected:
            return "linked"
        link_failed = self.link.failures >= FALLBACK_AFTER
        return "fallback" if self._fallback is not None and link_failed else "unlinked"

    def lacks_adapter(self, adapter: str) -> bool:
        """Return True if the replica is known not to serve the adapter.

        That can differ from the router's configuration for a moment, or if it cannot be loaded.
        """
        if self.adapters is None:
            return self.info.lacks_adapter(adapter)
        return adapter not in self.adapters.loaded

    def resume_key(self, adapter: str | None) -> str:
        """Return the key of the replicas that can continue its answers with this adapter, if any.

        Empty if it keeps no journals that this router understands.
        """
        key = self.info.resume_key if self.info.journal_format == JOURNAL_FORMAT else ""
        if adapter is None or self.adapters is None or not key:
            return key
        return f"{key} {self.adapters.loaded.get(adapter)}"

    def open(self, head: RequestHead, body: bytes) -> Answer:
        """Send a request to the replica.

        Raises:
            LinkClosedError: The replica cannot be reached now.
        """
        if self._fallback is not None and self.state == "fallback":
            return self._fallback(head, body)
        return self.link.open(head, body)

    def remove_movable(self, answer: Movable) -> None:
        """Note that an answer has ended here, or that no other replica can continue it."""
        self.movable.discard(answer)
        if not self.movable and self.mover is not None:
            self.mover.cancel()

    @property
    def is_draining(self) -> bool:
        """True if the replica finishes its requests, and others get the new ones."""
        return self.is_retired or self.is_leaving or self.link.state is LinkState.DRAINING

    @property
    def reach(self) -> Reach:
        """Eligibility for new requests, by connectivity."""
        return _REACH[self.state]


_REACH = {"linked": Reach.USUAL, "fallback": Reach.LAST_RESORT, "unlinked": Reach.NONE}
