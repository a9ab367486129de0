"""One pool as a router sees it: its running replicas and their links.

Owns the links, and tells ``routing`` what happens on them; ``waiting`` has the requests that have
no place yet. Learns which replicas run from ``update`` alone; how that is found out is not known
here.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from ssl import SSLContext
from typing import Any, Literal, Protocol

from cluster.admission import PoolCapacity, QueueLimits
from cluster.config import RoutingPolicy
from cluster.errors import UnavailableError
from cluster.gateway.pools.claim import Claim
from cluster.gateway.pools.queue import AdmissionQueue, SlotSource
from cluster.gateway.pools.routes import RouteTable
from cluster.gateway.recording.observer import PoolMeter
from cluster.link import LinkClient, LinkCounts, LinkState, PrefixEvents, RequestHead, ResponseHead
from cluster.load import Load
from cluster.routing import (
    Fleet,
    Placement,
    PrefixIndex,
    Reach,
    TokenEstimator,
    make_policy,
)
from cluster.usage import Usage

logger = logging.getLogger("ray.serve.tandem")

Kind = Literal["generator", "classifier"]

FALLBACK_AFTER = 2
"""Attempts to open a link that must have failed before the replica is asked in another way."""

_NO_ADAPTER_RETRY_S = 5.0

WAITING_RATIO: Mapping[Kind, float] = {"generator": 0.25, "classifier": 2.0}
"""Requests that may wait in the engines for each that runs. An encoder makes its next batches of
those that wait; a language model's batch takes in a new one whenever one ends."""


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """A running replica, as it describes itself to Ray Serve."""

    id: str
    host: str
    port: int
    routes: tuple[str, ...] = ()
    """The paths that its engine serves."""
    versions: dict[str, str] = field(default_factory=dict)
    adapters: tuple[str, ...] | None = ()
    """LoRA adapters that its engine serves: in a rolling update not always the router's. None: it
    does not say, which older versions do not, and may have all."""

    def lacks(self, adapter: str) -> bool:
        """Whether requests for this adapter are not for it."""
        return self.adapters is not None and adapter not in self.adapters

    def metadata(self) -> dict[str, Any]:
        """The form in which it travels through Ray Serve."""
        return {
            "host": self.host,
            "port": self.port,
            "routes": list(self.routes),
            "versions": self.versions,
            "adapters": None if self.adapters is None else list(self.adapters),
        }

    @classmethod
    def from_metadata(cls, replica_id: str, metadata: dict[str, Any]) -> "ReplicaInfo":
        """The inverse of ``metadata``.

        Raises:
            KeyError: the replica did not describe itself.
        """
        return cls(
            id=replica_id,
            host=metadata["host"],
            port=metadata["port"],
            routes=tuple(metadata["routes"]),
            versions=dict(metadata["versions"]),
            adapters=None if (told := metadata.get("adapters")) is None else tuple(told),
        )


class Answer(Protocol):
    """An open request at a replica; ``cluster.link.ClientStream`` is the usual one."""

    @property
    def usage(self) -> Usage | None:
        """The tokens that it took; known at its end, where the application counts them."""

    async def head(self) -> ResponseHead:
        """The response's head; raises as ``ClientStream.head`` does."""

    async def read(self) -> bytes:
        """Everything that has arrived, waiting only if that is nothing; b"" at the end."""

    def cancel(self) -> None:
        """End the work on the replica; safe to call at any time."""


Opener = Callable[[RequestHead, bytes], Answer]
"""Sends a request to one replica; LinkClosedError where that cannot be done now."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """How a router reaches replicas."""

    secret: bytes
    """What both ends of a link must know."""
    ssl: SSLContext | None = None
    fallback: Callable[[str], Opener] | None = None
    """For a replica's id, the way to it that is taken where no link can be opened."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How much one pool takes from one router."""

    max_in_flight: int
    """Requests that one replica is given at a time."""
    queue: QueueLimits
    queue_timeout_s: float
    routing: RoutingPolicy
    engine_priorities: bool = False
    """Whether its engines take a class with each request (``engine_priority``)."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters of its model, which clients name as they name the model."""
    max_loras: int = 1
    """Of these, how many a replica has loaded at a time."""
    start_timeout_s: float | None = None
    """The same as ``queue_timeout_s`` while none runs, of a pool that may be without replicas."""


class Replica:
    """One replica, the link to it, and the way that is left without a link."""

    def __init__(self, info: ReplicaInfo, link: LinkClient, fallback: Opener | None) -> None:
        self.info = info
        self.link = link
        self._fallback = fallback
        self.in_flight = 0
        """Requests that this router gave it and that have not ended."""
        self.retired = False
        """Whether Serve has taken it out."""

    @property
    def state(self) -> Literal["linked", "fallback", "unlinked"]:
        """How it can be reached now: over its link, without one, or not at all."""
        if self.link.connected:
            return "linked"
        unreachable = self.link.failures >= FALLBACK_AFTER
        return "fallback" if self._fallback is not None and unreachable else "unlinked"

    def open(self, head: RequestHead, body: bytes) -> Answer:
        """Send it a request.

        Raises:
            LinkClosedError: it cannot be reached now.
        """
        if self._fallback is not None and self.state == "fallback":
            return self._fallback(head, body)
        return self.link.open(head, body)

    @property
    def is_draining(self) -> bool:
        """Whether it only finishes what it has."""
        return self.retired or self.link.state is LinkState.DRAINING

    @property
    def reach(self) -> Reach:
        """When it may be chosen, as things stand."""
        return _REACH[self.state]


_REACH = {"linked": Reach.USUAL, "fallback": Reach.LAST_RESORT, "unlinked": Reach.NONE}


@dataclass(slots=True)
class PrefixCounts:
    """What replicas said of their prefix caches."""

    stored: int = 0
    removed: int = 0
    cleared: int = 0

    def add(self, events: PrefixEvents) -> None:
        """Count what one frame said."""
        self.stored += len(events.stored)
        self.removed += len(events.removed)
        self.cleared += events.cleared


@dataclass(frozen=True, slots=True)
class Slot:
    """A request's place at a replica; give it back with ``Pool.release``."""

    replica: Replica
    placement: Placement
    """The account that routing keeps of it."""
    claim: Claim
    since_s: float
    """Monotonic."""


class Pool:
    """The replicas of one deployment and the requests that wait for them."""

    def __init__(
        self, name: str, kind: Kind, limits: PoolLimits, wiring: Wiring, meter: PoolMeter
    ) -> None:
        self.name = name
        self.kind: Kind = kind
        self.models = (name, *limits.adapters)
        """What clients may name: the pool, and its adapters."""
        self.meter = meter
        self.routes = RouteTable()
        """What its replicas' engines serve, as far as they have said."""
        self.link_counts = LinkCounts()
        """What passed on all links to its replicas, present and past."""
        self.limits = limits
        self.waiting = AdmissionQueue(
            name,
            limits.queue,
            PoolCapacity(WAITING_RATIO[kind]),
            SlotSource(self._take, self.release, lambda: self.num_ready > 0),
            meter,
        )
        """The requests that have no place yet."""
        self._wiring = wiring
        self.estimate = TokenEstimator(generates=kind == "generator")
        """How many tokens a request takes."""
        self.prefixes = PrefixIndex()
        """What its replicas have in their KV caches."""
        self.prefix_counts = PrefixCounts()
        self.fleet = Fleet(limits.max_loras)
        """What a choice among them is made by."""
        self._policy = make_policy(limits.routing, self.prefixes, random.getrandbits(16))
        self._choices = meter.choices(limits.routing)
        self._replicas: dict[str, Replica] = {}
        self._without: dict[str, frozenset[str]] = {}  # of each adapter, the replicas that lack it
        self._retired: set[Replica] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    def needs_adapter(self, model: str) -> str | None:
        """The adapter that a request for ``model`` is placed by; None where all are everywhere."""
        adapters = self.limits.adapters
        return model if model in adapters and len(adapters) > self.limits.max_loras else None

    @property
    def queue_timeout_s(self) -> float:
        """The longest that a request that comes now waits for a place."""
        limits = self.limits
        return (self.asleep and limits.start_timeout_s) or limits.queue_timeout_s

    @property
    def asleep(self) -> bool:
        """Whether it has no replica, as it may; the first request has one started."""
        return self.limits.start_timeout_s is not None and not self._replicas

    @property
    def replicas(self) -> list[Replica]:
        """The replicas that Serve says are running."""
        return list(self._replicas.values())

    @property
    def num_ready(self) -> int:
        """Replicas that can take a request over their link now."""
        return sum(replica.link.connected for replica in self._replicas.values())

    @property
    def num_in_flight(self) -> int:
        """Requests that this router gave to the running replicas and that have not ended."""
        return sum(replica.in_flight for replica in self._replicas.values())

    @property
    def loads(self) -> list[Load]:
        """The last report of each running replica that has made one."""
        return list(self._reports())

    def _reports(self) -> Iterator[Load]:
        replicas = self._replicas.values()
        return (load for replica in replicas if (load := replica.link.load) is not None)

    @property
    def num_queued(self) -> int:
        """Requests that wait in this router for a place in this pool."""
        return len(self.waiting)

    def status(self) -> dict[str, Any]:
        """The pool in numbers, as this router sees it."""
        return {
            "kind": self.kind,
            "replicas": len(self._replicas),
            "ready": self.num_ready,
            "asleep": self.asleep,
            "queued": self.num_queued,
            "ongoing": self.num_in_flight,
            "running": sum(load.running for load in self.loads),
        }

    def serves(self, path: str) -> bool | None:
        """Whether a replica's engine has this path; None while no replica has said."""
        return self.routes.find(path) is not None if self.routes else None

    def update(self, running: Iterable[ReplicaInfo]) -> None:
        """Take the set of running replicas: links to new ones open, those to old ones drain."""
        infos = {} if self._closed else {info.id: info for info in running}
        for gone in self._replicas.keys() - infos.keys():
            replica = self._replicas.pop(gone)
            self.fleet.remove(gone)
            self.prefixes.clear(gone)
            replica.retired = True
            self._retired.add(replica)
            self._end_if_idle(replica)
        for info in infos.values():
            if info.id not in self._replicas:
                self._replicas[info.id] = self._connect(info)
        self._without = {
            adapter: frozenset(id for id, info in infos.items() if info.lacks(adapter))
            for adapter in self.limits.adapters
        }
        self.routes = RouteTable(route for info in infos.values() for route in info.routes)
        self.waiting.dispatch()

    def _connect(self, info: ReplicaInfo) -> Replica:
        wiring = self._wiring
        link = LinkClient(
            info.host, info.port, wiring.secret, ssl=wiring.ssl, counts=self.link_counts
        )
        replica = Replica(info, link, wiring.fallback and wiring.fallback(info.id))

        fleet = self.fleet
        fleet.add(info.id, self.limits.max_in_flight, Reach.NONE)

        def on_state(_state: LinkState) -> None:
            if self._replicas.get(info.id) is replica:  # else it is retired
                fleet.forget_load(info.id)
                fleet.set_reach(info.id, replica.reach)
                self.waiting.dispatch()

        def on_load(load: Load) -> None:
            if self._replicas.get(info.id) is replica:
                fleet.update_load(info.id, load)
                self.waiting.observe(self._reports())
                self.waiting.dispatch()

        def on_prefixes(events: PrefixEvents) -> None:
            if self._replicas.get(info.id) is replica:
                self._take_prefixes(info.id, events)

        link.on_state, link.on_load, link.on_prefixes = on_state, on_load, on_prefixes
        link.start()
        return replica

    def _take_prefixes(self, replica_id: str, events: PrefixEvents) -> None:
        if events.cleared:
            self.prefixes.clear(replica_id)
        self.prefixes.remove_stored(replica_id, events.removed)
        self.prefixes.add_stored(replica_id, events.stored)
        self.prefix_counts.add(events)

    async def admit(self, claim: Claim) -> Slot:
        """A place at a replica, at once or after a wait; give it back with ``release``.

        Raises:
            OverloadedError: the queue is full, or the place would come or came too late.
            UnavailableError: the wait was too long and no replica runs, none that runs has the
                adapter, or the router stops.
        """
        return await self.waiting.place(claim)

    def first_token(self, place: Slot) -> None:
        """Note that the first token came of a request that has a place."""
        self.fleet.advance(time.monotonic())
        self.fleet.record_first_token(place.placement)

    def release(
        self, place: Slot, done_tokens: float | None = 0.0, usage: Usage | None = None
    ) -> None:
        """Give back a place that ``admit`` gave.

        Args:
            place: Which one.
            done_tokens: The work that was done; 0 where it failed, None where that is not known.
            usage: The tokens that were taken, where the replica said so.
        """
        now_s = time.monotonic()
        self.fleet.advance(now_s)
        self.fleet.end(place.placement, usage)
        place.replica.in_flight -= 1
        self.waiting.leave(place.claim, done_tokens, now_s - place.since_s)
        self._end_if_idle(place.replica)
        self.waiting.dispatch()

    def _take(self, claim: Claim) -> Slot | None:
        """A place at a replica with room; without a link only where all that have one are full.

        Raises:
            UnavailableError: replicas run, but none of them has the adapter, or only others have
                room: the request would hold up all that could be served there.
        """
        fleet, request, now_s = self.fleet, claim.view, time.monotonic()
        fleet.advance(now_s)
        self.prefixes.advance(now_s)
        without = self._without.get(claim.adapter or "", ())
        if without and len(without) == len(self._replicas):
            raise self._lacking(claim, "no replica has")
        with fleet.hide(without) if without else nullcontext():
            chosen = self._policy.choose(request, fleet)
        self.meter.choice_s.observe(time.monotonic() - now_s)
        if chosen is None:
            if without and self._policy.choose(request, fleet) is not None:
                raise self._lacking(claim, "no replica with room has")
            return None
        self._choices.add()
        held = self.prefixes.count(chosen, request.prefix)
        cached_tokens = request.prefix_tokens[held - 1] if held else 0.0
        self.prefixes.expect(chosen, request.prefix)
        replica = self._replicas[chosen]
        replica.in_flight += 1
        return Slot(replica, fleet.place(chosen, request, cached_tokens), claim, now_s)

    def _lacking(self, claim: Claim, who: str) -> UnavailableError:
        return UnavailableError(
            f"{self.name}: {who} the adapter `{claim.adapter}` now",
            retry_after_s=_NO_ADAPTER_RETRY_S,
        )

    def _end_if_idle(self, replica: Replica) -> None:
        if replica in self._retired and (replica.in_flight == 0 or self._closed):
            self._retired.discard(replica)
            task = asyncio.ensure_future(replica.link.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close every link; requests that wait are told that the router stops."""
        self._closed = True
        self.waiting.close()
        self.update(())
        for replica in list(self._retired):
            self._end_if_idle(replica)
        if self._closing:
            await asyncio.wait(self._closing)
