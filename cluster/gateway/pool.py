"""One pool as a router sees it: its running replicas, their links, and the queue before them.

Owns the links and the count of requests that this router gave to each replica. Learns which
replicas run from ``update`` alone; how that is found out is not known here.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from ssl import SSLContext
from typing import Any, Literal, Protocol

from cluster.errors import OverloadedError, UnavailableError
from cluster.gateway.metering import PoolMeter
from cluster.gateway.routes import RouteTable
from cluster.link import (
    LinkClient,
    LinkCounts,
    LinkLoad,
    LinkState,
    LinkUsage,
    RequestHead,
    ResponseHead,
)
from cluster.routing import LeastLoad, Policy, ReplicaView

logger = logging.getLogger("ray.serve.tandem")

Kind = Literal["generator", "classifier"]

FALLBACK_AFTER = 2
"""Attempts to open a link that must have failed before the replica is asked in another way."""


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """A running replica, as it describes itself to Ray Serve."""

    id: str
    host: str
    port: int
    routes: tuple[str, ...] = ()
    """The paths that its engine serves."""
    versions: dict[str, str] = field(default_factory=dict)

    def metadata(self) -> dict[str, Any]:
        """The form in which it travels through Ray Serve."""
        return {
            "host": self.host,
            "port": self.port,
            "routes": list(self.routes),
            "versions": self.versions,
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
        )


class Answer(Protocol):
    """An open request at a replica; ``cluster.link.Stream`` is the usual one."""

    @property
    def usage(self) -> LinkUsage | None:
        """The tokens that it took; known at its end, where the application counts them."""

    async def head(self) -> ResponseHead:
        """The response's head; raises as ``Stream.head`` does."""

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

    max_ongoing: int
    """Requests that one replica is given at a time."""
    max_queued: int
    queue_timeout_s: float
    start_timeout_s: float | None = None
    """The same as ``queue_timeout_s`` while none runs, of a pool that may be without replicas."""


class Replica:
    """One replica, the link to it, and the way that is left without a link."""

    def __init__(self, info: ReplicaInfo, link: LinkClient, fallback: Opener | None) -> None:
        self.info = info
        self.link = link
        self._fallback = fallback
        self.own = 0
        """Requests that this router gave it and that have not ended."""
        self._others = 0

    @property
    def ongoing(self) -> int:
        """This router's requests, and those that it was last said to have from others."""
        return self.own + self._others

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

    def note_load(self, load: LinkLoad | None) -> None:
        """Take in the replica's report of its load; None: it is not known any more."""
        self._others = 0 if load is None else max(0, load.ongoing - self.own)


class Pool:
    """The replicas of one deployment and the requests that wait for them."""

    def __init__(
        self, name: str, kind: Kind, limits: PoolLimits, wiring: Wiring, meter: PoolMeter
    ) -> None:
        self.name = name
        self.kind: Kind = kind
        self.meter = meter
        self.routes = RouteTable()
        """What its replicas' engines serve, as far as they have said."""
        self.link_counts = LinkCounts()
        """What passed on all links to its replicas, present and past."""
        self._limits = limits
        self._wiring = wiring
        self._policy: Policy = LeastLoad()
        self._replicas: dict[str, Replica] = {}
        self._retired: set[Replica] = set()
        self._waiting: dict[asyncio.Future[Replica], None] = {}  # in the order of arrival
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def queue_timeout_s(self) -> float:
        """The longest that a request that comes now waits for a place."""
        limits = self._limits
        return (self.asleep and limits.start_timeout_s) or limits.queue_timeout_s

    @property
    def asleep(self) -> bool:
        """Whether it has no replica, as it may; the first request has one started."""
        return self._limits.start_timeout_s is not None and not self._replicas

    @property
    def replicas(self) -> list[Replica]:
        """The replicas that Serve says are running."""
        return list(self._replicas.values())

    @property
    def num_ready(self) -> int:
        """Replicas that can take a request over their link now."""
        return sum(replica.link.connected for replica in self._replicas.values())

    @property
    def num_queued(self) -> int:
        """Requests that wait in this router for a place in this pool."""
        return len(self._waiting)

    def status(self) -> dict[str, Any]:
        """The pool in numbers, as this router sees it."""
        loads = [replica.link.load for replica in self._replicas.values()]
        return {
            "kind": self.kind,
            "replicas": len(self._replicas),
            "ready": self.num_ready,
            "asleep": self.asleep,
            "queued": self.num_queued,
            "ongoing": sum(replica.own for replica in self._replicas.values()),
            "running": sum(load.running for load in loads if load is not None),
        }

    def serves(self, path: str) -> bool | None:
        """Whether a replica's engine has this path; None while no replica has said."""
        return self.routes.find(path) is not None if self.routes else None

    def update(self, running: Iterable[ReplicaInfo]) -> None:
        """Take the set of running replicas: links to new ones open, those to old ones drain."""
        infos = {} if self._closed else {info.id: info for info in running}
        for gone in self._replicas.keys() - infos.keys():
            replica = self._replicas.pop(gone)
            self._retired.add(replica)
            self._end_if_idle(replica)
        for info in infos.values():
            if info.id not in self._replicas:
                self._replicas[info.id] = self._connect(info)
        self.routes = RouteTable(route for info in infos.values() for route in info.routes)

    def _connect(self, info: ReplicaInfo) -> Replica:
        wiring = self._wiring
        link = LinkClient(
            info.host, info.port, wiring.secret, ssl=wiring.ssl, counts=self.link_counts
        )
        replica = Replica(info, link, wiring.fallback and wiring.fallback(info.id))

        def on_state(_state: LinkState) -> None:
            replica.note_load(None)
            self._dispatch()

        def on_load(load: LinkLoad) -> None:
            replica.note_load(load)
            self._dispatch()

        link.on_state, link.on_load = on_state, on_load
        link.start()
        return replica

    async def admit(self, timeout_s: float) -> Replica:
        """A place at a replica, at once or after a wait; give it back with ``release``.

        Raises:
            OverloadedError: the queue is full, or the wait was too long while replicas ran.
            UnavailableError: the wait was too long and no replica runs, or the router stops.
        """
        if self._closed:
            raise _stopping()
        if not self._waiting and (replica := self._choose()) is not None:
            replica.own += 1
            return replica
        if self.num_queued >= self._limits.max_queued:
            self.meter.shed.add()
            raise OverloadedError(
                f"{self.name}: {self._limits.max_queued} requests are waiting already",
                retry_after_s=1,
            )
        place: asyncio.Future[Replica] = asyncio.get_running_loop().create_future()
        self._waiting[place] = None
        try:
            async with asyncio.timeout(timeout_s):
                return await place
        except TimeoutError:
            self._give_back(place)
            raise self._too_late() from None
        except asyncio.CancelledError:
            self._give_back(place)
            raise

    def _give_back(self, place: asyncio.Future[Replica]) -> None:
        self._waiting.pop(place, None)
        # The place may have been granted in the same pass in which its waiter left.
        if place.done() and not place.cancelled() and place.exception() is None:
            self.release(place.result())

    def _too_late(self) -> OverloadedError | UnavailableError:
        waited = f"{self.queue_timeout_s:g} s"
        if self.num_ready == 0:
            return UnavailableError(
                f"{self.name}: no replica became ready within {waited}", retry_after_s=5
            )
        self.meter.shed.add()
        return OverloadedError(f"{self.name}: no place within {waited}", retry_after_s=5)

    def release(self, replica: Replica) -> None:
        """Give back a place that ``admit`` gave."""
        replica.own -= 1
        self._end_if_idle(replica)
        self._dispatch()

    def _choose(self) -> Replica | None:
        """A replica with room; one without a link only where all that have one are full."""
        replicas = self._replicas.values()
        linked = [replica for replica in replicas if replica.link.connected]
        chosen = self._policy.choose(self._views(linked))
        if chosen is None and len(linked) < len(replicas):
            others = [replica for replica in replicas if replica.state == "fallback"]
            chosen = self._policy.choose(self._views(others))
        return None if chosen is None else self._replicas[chosen]

    def _views(self, replicas: Iterable[Replica]) -> list[ReplicaView]:
        capacity = self._limits.max_ongoing
        return [ReplicaView(replica.info.id, replica.ongoing, capacity) for replica in replicas]

    def _dispatch(self) -> None:
        while self._waiting and (replica := self._choose()) is not None:
            place = next(iter(self._waiting))
            del self._waiting[place]
            if not place.done():  # else its waiter was cancelled and has not run yet
                replica.own += 1
                place.set_result(replica)

    def _end_if_idle(self, replica: Replica) -> None:
        if replica in self._retired and (replica.own == 0 or self._closed):
            self._retired.discard(replica)
            task = asyncio.ensure_future(replica.link.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close every link; requests that wait are told that the router stops."""
        self._closed = True
        for place in self._waiting:
            if not place.done():
                place.set_exception(_stopping())
        self._waiting.clear()
        self.update(())
        for replica in list(self._retired):
            self._end_if_idle(replica)
        if self._closing:
            await asyncio.wait(self._closing)


def _stopping() -> UnavailableError:
    return UnavailableError("the router is stopping", retry_after_s=1)
