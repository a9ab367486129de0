"""One simulated router: the live system's policy, fleet, prefix index and queue."""

from typing import TYPE_CHECKING

from cluster.admission.fair_queue import FairQueue, QueueEntry
from cluster.routing import Fleet, FleetGuard, PrefixIndex, RequestView, TokenEstimator
from cluster.simulation.replica import SimulatedReplica
from cluster.simulation.requests import Outcome, SimulatedRequest, TraceRequest
from cluster.usage import Usage

if TYPE_CHECKING:
    from cluster.simulation.simulator import Simulation

MAX_ATTEMPTS = 3
"""Replicas that a request is tried on, as in the gateway."""
BYTES_PER_TOKEN = 4
"""Length of a body relative to its prompt; the value does not matter, routers learn the ratio."""


class SimulatedRouter:
    """State of one router, and the requests queued in it."""

    def __init__(self, number: int, simulation: "Simulation") -> None:
        settings = simulation.settings
        self.fleet, self.index = Fleet(), PrefixIndex()
        self.guard = FleetGuard(self.fleet, settings.breaker)
        self.queue: FairQueue[SimulatedRequest] = FairQueue(settings.queue)
        seed = settings.seed + number
        self.policy = settings.policy(self.index, simulation.cached_tokens, seed)
        self._settings, self._events, self._simulation = settings, simulation.events, simulation
        self._estimator = TokenEstimator(generates=True)
        self._block_ends: tuple[float, ...] = ()  # in tokens, grown on demand

    def add_replica(self, replica: SimulatedReplica) -> None:
        self.guard.add(replica.id, self._settings.max_in_flight)
        self._dispatch()

    def remove_replica(self, replica: SimulatedReplica) -> None:
        if replica.id in self.fleet:
            self.guard.remove(replica.id)
            self.index.clear(replica.id)

    def update_cache(self, replica_id: str, stored: list[int], evicted: list[int]) -> None:
        if replica_id in self.fleet:
            self.index.add_stored(replica_id, stored)
            self.index.remove_stored(replica_id, evicted)

    def update_load(self, replica: SimulatedReplica) -> None:
        if replica.id in self.fleet:
            self.fleet.update_load(replica.id, replica.engine.load)

    def admit(self, request: SimulatedRequest) -> None:
        request.view = self._view_request(request.spec)
        if not len(self.queue) and self._place(request):
            return
        now_s = self._events.now_s
        work_tokens = request.view.prompt_tokens + request.view.completion_tokens
        # A pool that can scale to zero has a longer timeout while it starts.
        start_timeout_s = None if len(self.fleet) else self._settings.start_timeout_s
        expires_s = now_s + (start_timeout_s or self._settings.queue_timeout_s)
        entry = QueueEntry(request, request.spec.tenant, work_tokens, expires_s)
        if not self.queue.push(entry):
            self._simulation.finish_request(request, Outcome.SHED)
            return
        request.entry = entry
        self._events.schedule(expires_s, self._expire, entry)

    def first_token(self, request: SimulatedRequest) -> None:
        if request.placement is not None:
            self.guard.advance(self._events.now_s)
            self.guard.record_first_token(request.placement)

    def request_done(self, request: SimulatedRequest) -> None:
        spec, placement = request.spec, request.placement
        usage = Usage(spec.prompt_tokens, request.cached_tokens, spec.completion_tokens)
        self._estimator.learn_usage(spec.prompt_tokens * BYTES_PER_TOKEN, usage)
        if placement is not None:
            self.guard.advance(self._events.now_s)
            self.guard.record_answer(placement, usage)
            self.guard.end(placement, usage)
        self._simulation.finish_request(request, Outcome.DONE)
        self._dispatch()

    def request_lost(self, request: SimulatedRequest) -> None:
        """Handle the loss of a request's replica: retry if no token has been sent."""
        if request.placement is not None:
            self.guard.end(request.placement, None)
        if request.first_token_s is not None or request.attempts >= MAX_ATTEMPTS:
            self._simulation.finish_request(request, Outcome.FAILED)
        else:
            self.admit(request)

    def _view_request(self, spec: TraceRequest) -> RequestView:
        blocks = spec.blocks
        if len(blocks) > len(self._block_ends):
            size = float(self._simulation.trace.block_tokens)
            self._block_ends = tuple(size * at for at in range(1, 2 * len(blocks) + 1))
        tokens = spec.prompt_tokens * BYTES_PER_TOKEN * self._estimator.tokens_per_byte
        return RequestView(
            prompt_tokens=tokens,
            completion_tokens=self._estimator.view_request(0).completion_tokens,
            prefix=blocks,
            prefix_tokens=self._block_ends[: len(blocks)],
            session=spec.session,
            streamed=True,
        )

    def _place(self, request: SimulatedRequest) -> bool:
        """Place a request on a replica; return False if every replica is full."""
        view, now_s = request.view, self._events.now_s
        assert view is not None
        self.guard.advance(now_s)
        self.index.advance(now_s)
        chosen = self.guard.take_trial() or self.policy.choose(view, self.fleet)
        chosen = chosen or self.guard.last_resort()
        if chosen is None:
            return False
        num_cached = self.index.count(chosen, view.prefix)
        self.index.expect(chosen, view.prefix, num_cached)
        cached_tokens = view.prefix_tokens[num_cached - 1] if num_cached else 0.0
        request.placement = self.fleet.place(chosen, view, cached_tokens)
        self.guard.place(request.placement)
        request.attempts += 1
        if not self._simulation.by_id[chosen].add_request(request):
            self.guard.end(request.placement, None)
            self._simulation.finish_request(request, Outcome.FAILED)
        return True

    def _dispatch(self) -> None:
        while (entry := self.queue.peek()) is not None:
            entry.item.entry = None
            if not self._place(entry.item):
                entry.item.entry = entry
                return
            self.queue.pop()

    def _expire(self, entry: QueueEntry[SimulatedRequest]) -> None:
        if entry.item.entry is entry:
            entry.item.entry = None
            self.queue.remove(entry)
            self._simulation.finish_request(entry.item, Outcome.LATE)
