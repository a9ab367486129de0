"""The running replicas of one pool: their links, and the choice of a replica for a request.

``update`` is the only source of the list of running replicas. Links report state, load and prefix
caches; the set passes these to ``cluster.routing``, then calls ``on_change`` or ``on_load``.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

from cluster.admission import QueueLimits
from cluster.config import RoutingPolicy
from cluster.errors import UnavailableError
from cluster.gateway.pools.handover import HandoverLimits
from cluster.gateway.pools.replica import Replica, ReplicaInfo, Wiring
from cluster.gateway.pools.slots import Claim, EngineSlots, Slot
from cluster.gateway.recording.observer import PoolMeter
from cluster.link import Adapters, AnswerEvents, LinkClient, LinkCounts, LinkState, PrefixEvents
from cluster.load import Load
from cluster.routing import (
    BreakerLimits,
    Circuit,
    Fleet,
    FleetGuard,
    PrefixIndex,
    Reach,
    make_policy,
)
from cluster.usage import Usage

_OPEN_STATES = (LinkState.CONNECTED, LinkState.SILENT)
logger = logging.getLogger("ray.serve.tandem")

_NO_ADAPTER_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Settings of one pool in one router."""

    max_in_flight: int
    """Requests that one replica may have at a time."""
    queue: QueueLimits
    queue_timeout_s: float
    routing: RoutingPolicy
    engine_priorities: bool = False
    """True if the engines schedule by the ``priority`` field of a request's body."""
    aliases: tuple[str, ...] = ()
    """Further names of the model."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters of the model, which clients name like a model."""
    max_loras: int = 1
    """Adapters that a replica keeps loaded at a time."""
    start_timeout_s: float | None = None
    """Replaces ``queue_timeout_s`` while the pool is scaled to zero. None if it never is."""
    max_sequences: int | None = None
    """Sequences that one request may have; None if the engine limits them."""
    handover: HandoverLimits | None = None
    """Limits of hand-overs; None if answers are not handed over."""
    breaker: BreakerLimits | None = None
    """Limits of the circuit breakers; None if no replica is taken out."""
    hedge_share: float = 0.0
    """Share of the requests that may be sent to a second replica; 0 if none."""
    context_tokens: int | None = None
    """Configured context of the model; the replicas' own values replace it."""


@dataclass(slots=True)
class PrefixCounts:
    """Number of prefix-cache events received from the replicas, by kind."""

    stored: int = 0
    removed: int = 0
    cleared: int = 0


class ReplicasLostError(UnavailableError):
    """The replicas that could continue an answer have no link; they may come back or be replaced.

    Serve lists a dead replica as running until it notices the death.
    """


class ReplicaSet:
    """Slots at the running replicas of one pool."""

    def __init__(self, name: str, limits: PoolLimits, wiring: Wiring, meter: PoolMeter) -> None:
        self.on_change: Callable[[], None] = lambda: None
        """Called when a replica's connectivity changed."""
        self.on_leaving: Callable[[Replica], None] = lambda _: None
        """Called when a replica or its node begins to drain, or when it is silent."""
        self.on_load: Callable[[Iterable[Load]], None] = lambda _: None
        """Called with the loads of all replicas when one of them reported its load."""
        self.on_answer: dict[bytes, Callable[[str], None]] = {}
        """Callbacks that get the ids of replicas with an awaited answer, by the answer's id."""
        self.link_counts = LinkCounts()
        """Traffic on the links to all replicas, past ones included."""
        self.prefixes = PrefixIndex()
        """Prefixes in the replicas' KV caches."""
        self.prefix_counts = PrefixCounts()
        self.fleet = Fleet(limits.max_loras)
        """Routing's view of the replicas."""
        self.guard = FleetGuard(self.fleet, limits.breaker, self._on_circuit)
        """Replicas that routing must avoid."""
        self.policy = make_policy(limits.routing, self.prefixes, random.getrandbits(16))
        self._name = name
        self._limits = limits
        self._wiring = wiring
        self._meter = meter
        self._decisions = meter.decisions(limits.routing)
        self._replicas: dict[str, Replica] = {}
        self._lacking: dict[str, frozenset[str]] = {}  # by adapter, the replicas without it
        self._retired: set[Replica] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._draining_nodes: frozenset[str] = frozenset()
        self._closed = False

    def __len__(self) -> int:
        return len(self._replicas)

    @property
    def running(self) -> list[Replica]:
        """The replicas that Ray Serve lists as running."""
        return list(self._replicas.values())

    @property
    def loads(self) -> list[Load]:
        """The last load of each running replica that has reported one."""
        return list(self._reported_loads())

    def has(self, replica_id: str) -> bool:
        """Return True if the replica runs."""
        return replica_id in self._replicas

    @property
    def num_ready(self) -> int:
        """Number of replicas whose link is open."""
        return sum(replica.link.connected for replica in self._replicas.values())

    @property
    def has_room(self) -> bool:
        """True if a replica can take a request of any kind now."""
        return bool(self.fleet.open_rows().any()) or self.guard.last_resort() is not None

    def engine_slots(self) -> EngineSlots | None:
        """Return the slots of the engines; None if one does not report them.

        Those of replicas that drain do not count.
        """
        total = free = 0
        for replica in self._replicas.values():
            load = replica.link.load
            if load is None or not load.slots:
                return None
            if not replica.is_draining:
                total += load.slots
                free += load.slots - replica.in_flight - replica.num_elsewhere
        return EngineSlots(total, free)

    def update(self, infos: Mapping[str, ReplicaInfo]) -> None:
        """Set the running replicas, by id: open links to new ones, retire those that are gone."""
        for gone in self._replicas.keys() - infos.keys():
            replica = self._replicas.pop(gone)
            self.guard.remove(gone)
            self.prefixes.clear(gone)
            replica.is_retired = True
            self._retired.add(replica)
            self.on_leaving(replica)
            self._close_if_idle(replica)
        for info in infos.values():
            if info.id not in self._replicas:
                self._replicas[info.id] = self._connect(info)
        self.set_draining_nodes(self._draining_nodes)
        self._find_lacking()

    def set_limits(self, limits: PoolLimits) -> None:
        """Apply changed settings to all replicas."""
        if limits.routing != self._limits.routing:
            self.policy = make_policy(limits.routing, self.prefixes, random.getrandbits(16))
            self._decisions = self._meter.decisions(limits.routing)
        self._limits = limits
        self.fleet.adapters.set_max_loaded(limits.max_loras)
        self.guard.set_limits(limits.breaker)
        for id_ in self._replicas:
            self.fleet.set_capacity(id_, limits.max_in_flight)
        self._find_lacking()

    def _find_lacking(self) -> None:
        self._lacking = {
            adapter: frozenset(
                id_ for id_, replica in self._replicas.items() if replica.lacks_adapter(adapter)
            )
            for adapter in self._limits.adapters
        }

    def set_draining_nodes(self, node_ids: frozenset[str]) -> None:
        """Set the nodes that will leave the cluster soon; call this regularly.

        Their replicas get requests only if there are no others, and their answers move away.
        """
        self._draining_nodes = node_ids
        leaving = {id_ for id_, each in self._replicas.items() if each.info.node_id in node_ids}
        self.guard.set_leaving(leaving)
        for id_, replica in self._replicas.items():
            if id_ in leaving and not replica.is_leaving:
                logger.info("%s: the node of replica %s drains", self._name, id_)
            replica.is_leaving = id_ in leaving
            if replica.is_leaving:
                self.on_leaving(replica)

    def take_slot(self, claim: Claim) -> Slot | None:
        """Take a slot at a replica with room, or return None if all are full.

        Replicas without a link are used only when all linked ones are full, and those that routing
        avoids only if there are no others.

        Raises:
            UnavailableError: No running replica has the adapter, or those that have it are full
                while others have room; the request would block the queue behind it.
        """
        fleet, request, now_s = self.fleet, claim.view, time.monotonic()
        self.guard.advance(now_s)
        self.prefixes.advance(now_s)
        lacking = self._lacking.get(claim.adapter or "", frozenset())
        if claim.resume_key is not None:
            lacking = lacking | self._unable_to_resume(claim.resume_key, claim.adapter)
        hidden = lacking | claim.excluded & self._replicas.keys()
        if lacking and len(lacking) == len(self._replicas):
            raise self._unsuitable(claim, "no replica")
        # A request without a body does not reach the engine, so it is no trial.
        is_trial_possible = claim.body_bytes and not claim.is_retry
        chosen = self.guard.take_trial(hidden) if is_trial_possible else None
        if chosen is None:
            with fleet.hide(hidden) if hidden else nullcontext():
                chosen = self.policy.choose(request, fleet)
        if chosen is None and (avoided := self.guard.last_resort(hidden)) is not None:
            if claim.is_move:
                raise self._unsuitable(claim, "no other replica")
            chosen = avoided
        self._meter.routing_s.observe(time.monotonic() - now_s)
        if chosen is None:
            if lacking and self._has_other_room(claim):
                raise self._unsuitable(claim, "no replica with room")
            return None
        self._decisions.add()
        return self._place(chosen, claim, now_s)

    def take_slot_at(self, replica_id: str, claim: Claim) -> Slot | None:
        """Take a slot at this replica even if it is full; return None if it is gone."""
        replica = self._replicas.get(replica_id)
        if replica is None or not replica.link.connected:
            return None
        now_s = time.monotonic()
        self.guard.advance(now_s)
        return self._place(replica_id, claim, now_s)

    def find_answer(self, answer_id: bytes) -> str | None:
        """Return the id of the replica that keeps this answer, if any; of several, the least id."""
        found = (
            id_
            for id_, replica in self._replicas.items()
            if answer_id in replica.answer_ids and replica.link.connected
        )
        return min(found, default=None)

    def first_token(self, slot: Slot) -> None:
        """Note that the first token of a request has arrived."""
        self.guard.advance(time.monotonic())
        self.guard.record_first_token(slot.placement)

    def record_answer(self, slot: Slot, usage: Usage | None) -> None:
        """Note that a replica gave an answer, whose usage may be unknown."""
        self.guard.advance(time.monotonic())
        self.guard.record_answer(slot.placement, usage)

    def record_failure(self, slot: Slot, content: int) -> None:
        """Note that a replica failed a request, whose content has this hash."""
        self.guard.fail(slot.placement, content)

    def circuit(self, replica: Replica) -> Circuit:
        """Return the circuit breaker of a running replica."""
        return self.guard.circuit(replica.info.id)

    def is_trial(self, slot: Slot) -> bool:
        """Return True if the request is the trial of a replica that was taken out."""
        return self.guard.is_trial(slot.placement)

    def release_slot(self, slot: Slot, usage: Usage | None) -> float:
        """Release a slot and return the seconds for which it was taken."""
        now_s = time.monotonic()
        self.guard.advance(now_s)
        self.guard.end(slot.placement, usage)
        slot.replica.in_flight -= 1
        if slot.replica.is_retired:
            self._close_if_idle(slot.replica)
        return now_s - slot.since_s

    async def close(self) -> None:
        """Close every link at once, also those with requests in flight."""
        self._closed = True
        self.update({})
        for replica in list(self._retired):
            self._close_if_idle(replica)
        if self._closing:
            await asyncio.wait(self._closing)

    def _connect(self, info: ReplicaInfo) -> Replica:
        wiring = self._wiring
        link = LinkClient(
            info.host, info.port, wiring.secret, ssl=wiring.ssl, counts=self.link_counts
        )
        replica = Replica(info, link, wiring.fallback and wiring.fallback(info.id))
        fleet, guard = self.fleet, self.guard
        guard.add(info.id, self._limits.max_in_flight, Reach.NONE)

        def on_state(state: LinkState) -> None:
            was_open, replica.is_open = replica.is_open, link.state in _OPEN_STATES
            if state is LinkState.CONNECTING:
                replica.answer_ids.clear()  # the next connection starts with all of them
            if not replica.is_retired:
                fleet.forget_load(info.id)
                if was_open and state is LinkState.CONNECTING:
                    guard.fail_link(info.id)
                guard.set_reach(info.id, replica.reach)
                if state in (LinkState.DRAINING, LinkState.SILENT):
                    self.on_leaving(replica)
                elif state is LinkState.CONNECTED and replica.mover is not None:
                    replica.mover.cancel()  # it is back
                self.on_change()

        def on_load(load: Load) -> None:
            if not replica.is_retired:
                replica.num_elsewhere = max(0, load.in_flight - replica.in_flight)
                fleet.update_load(info.id, load)
                self.on_load(self._reported_loads())

        def on_prefixes(events: PrefixEvents) -> None:
            if not replica.is_retired:
                self._index_prefixes(info.id, events)

        def on_answers(events: AnswerEvents) -> None:
            replica.answer_ids.update(events.added)
            replica.answer_ids.difference_update(events.removed)
            for answer_id in self.on_answer.keys() & events.added:
                self.on_answer[answer_id](info.id)

        def on_adapters(adapters: Adapters) -> None:
            replica.adapters = adapters
            self._find_lacking()
            self.on_change()

        link.on_state, link.on_load, link.on_prefixes = on_state, on_load, on_prefixes
        if info.keeps_answers:
            link.on_answers = on_answers
        if info.reports_adapters:
            link.on_adapters = on_adapters
        link.start()
        return replica

    def _place(self, replica_id: str, claim: Claim, now_s: float) -> Slot:
        request, replica = claim.view, self._replicas[replica_id]
        held = self.prefixes.count(replica_id, request.prefix)
        cached_tokens = request.prefix_tokens[held - 1] if held else 0.0
        self.prefixes.expect(replica_id, request.prefix, held)
        replica.in_flight += 1
        placement = self.fleet.place(replica_id, request, cached_tokens)
        self.guard.place(placement)
        return Slot(replica, placement, claim, now_s)

    def _on_circuit(self, circuit: Circuit) -> None:
        self._meter.circuit_changed(circuit)
        text = f"{self._name}: the circuit of replica {circuit.replica_id} is "
        if circuit.state == "open":
            kind = "failed" if circuit.cause == "failing" else "were slow"
            logger.warning("%sopen: its recent requests %s, its peers' did not", text, kind)
        else:
            logger.info("%s%s", text, circuit.state.replace("_", "-"))
        # Not now: the change may be noticed while a slot is taken.
        asyncio.get_running_loop().call_soon(lambda: self.on_change())

    def _reported_loads(self) -> Iterator[Load]:
        replicas = self._replicas.values()
        return (load for replica in replicas if (load := replica.link.load) is not None)

    def _index_prefixes(self, replica_id: str, events: PrefixEvents) -> None:
        if events.cleared:
            self.prefixes.clear(replica_id)
        self.prefixes.remove_stored(replica_id, events.removed)
        self.prefixes.add_stored(replica_id, events.stored)
        counts = self.prefix_counts
        counts.stored += len(events.stored)
        counts.removed += len(events.removed)
        counts.cleared += events.cleared

    def _unable_to_resume(self, resume_key: str, adapter: str | None) -> frozenset[str]:
        """Return the replicas that cannot continue an answer of replicas with this key."""
        return frozenset(
            id_
            for id_, replica in self._replicas.items()
            if replica.resume_key(adapter) != resume_key or replica.state == "fallback"
        )

    def _has_other_room(self, claim: Claim) -> bool:
        """Return True if a replica has room that is not suitable for this request."""
        failed = claim.excluded & self._replicas.keys()
        with self.fleet.hide(failed) if failed else nullcontext():
            return self.policy.choose(claim.view, self.fleet) is not None

    def _unsuitable(self, claim: Claim, subject: str) -> UnavailableError:
        need = f"serves the adapter `{claim.adapter}` now"
        if claim.resume_key is not None:
            need = "can continue the answer"
        reason = f"{self._name}: {subject} {need}"
        is_lost = any(
            replica.resume_key(claim.adapter) == claim.resume_key and not replica.link.connected
            for replica in self._replicas.values()
        )
        error = ReplicasLostError if is_lost else UnavailableError
        return error(reason, retry_after_s=_NO_ADAPTER_RETRY_S)

    def _close_if_idle(self, replica: Replica) -> None:
        if replica in self._retired and (replica.in_flight == 0 or self._closed):
            self._retired.discard(replica)
            task = asyncio.ensure_future(replica.link.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
