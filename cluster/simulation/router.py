"""One router: the live system's policy, fleet, index and queue, told of simulated events."""

from typing import Protocol

from cluster.admission.fair_queue import FairQueue, QueueEntry
from cluster.routing import Fleet, PrefixIndex, Reach, RequestView, TokenEstimator
from cluster.simulation.calls import Call, Outcome
from cluster.simulation.events import Events
from cluster.simulation.replica import Replica
from cluster.simulation.requests import TraceRequest
from cluster.simulation.settings import CachedTokens, Settings
from cluster.usage import Usage

MAX_ATTEMPTS = 3
"""Replicas that a request is given to until one answers, as in the gateway."""
BYTES_PER_TOKEN = 4
"""Of a body; a router learns the ratio, so it does not matter."""


class Owner(Protocol):
    """Carries out what a router decides."""

    def give(self, call: Call, replica_id: str) -> bool:
        """Give a request to a replica; False: it can never fit."""

    def over(self, call: Call, outcome: Outcome) -> None:
        """A request has ended."""


class Router:
    """What one router knows, and the requests that wait in it."""

    def __init__(
        self,
        number: int,
        settings: Settings,
        events: Events,
        truth: CachedTokens,
        block_tokens: int,
        owner: Owner,
    ) -> None:
        self.fleet, self.index = Fleet(), PrefixIndex()
        self.queue: FairQueue[Call] = FairQueue(settings.queue)
        self.policy = settings.policy(self.index, truth, settings.seed + number)
        self._settings, self._events, self._owner = settings, events, owner
        self._block_tokens = block_tokens
        self._estimate = TokenEstimator(generates=True)
        self._ends: tuple[float, ...] = ()

    def add(self, replica: Replica) -> None:
        """A replica can be given requests."""
        self.fleet.add(replica.id, self._settings.max_in_flight, Reach.USUAL)
        self._dispatch()

    def remove(self, replica: Replica) -> None:
        """It is given no more."""
        if replica.id in self.fleet:
            self.fleet.remove(replica.id)
            self.index.clear(replica.id)

    def cache_changed(self, replica_id: str, stored: list[int], removed: list[int]) -> None:
        """What a replica says of its cache."""
        if replica_id in self.fleet:
            self.index.add_stored(replica_id, stored)
            self.index.remove_stored(replica_id, removed)

    def report(self, replica: Replica) -> None:
        """What a replica says of its load."""
        if replica.id in self.fleet:
            self.fleet.update_load(replica.id, replica.engine.load)

    def admit(self, call: Call) -> None:
        """Place a request, or let it wait."""
        call.view = self._view(call.request)
        if not len(self.queue) and self._place(call):
            return
        now_s = self._events.now_s
        work = call.view.prompt_tokens + call.view.completion_tokens
        expires_s = now_s + self._timeout_s()
        entry = QueueEntry(call, call.request.tenant, work, expires_s)
        if not self.queue.push(entry):
            self._owner.over(call, Outcome.SHED)
            return
        call.entry = entry
        self._events.at(expires_s, self._expire, entry)

    def first_token(self, call: Call) -> None:
        """The first token passes."""
        if call.placement is not None:
            self.fleet.advance(self._events.now_s)
            self.fleet.record_first_token(call.placement)

    def ended(self, call: Call) -> None:
        """The answer has ended well."""
        request, placement = call.request, call.placement
        taken = Usage(request.prompt_tokens, call.cached_tokens, request.completion_tokens)
        self._estimate.learn_usage(request.prompt_tokens * BYTES_PER_TOKEN, taken)
        if placement is not None:
            self.fleet.advance(self._events.now_s)
            self.fleet.end(placement, taken)
        self._owner.over(call, Outcome.DONE)
        self._dispatch()

    def lost(self, call: Call) -> None:
        """The replica of a request is gone: another one may answer while no token has passed."""
        if call.placement is not None:
            self.fleet.end(call.placement)
        if call.first_s is not None or call.attempts >= MAX_ATTEMPTS:
            self._owner.over(call, Outcome.FAILED)
        else:
            self.admit(call)

    def _timeout_s(self) -> float:
        starting_s = None if len(self.fleet) else self._settings.start_timeout_s
        return starting_s or self._settings.queue_timeout_s

    def _view(self, request: TraceRequest) -> RequestView:
        blocks = request.blocks
        if len(blocks) > len(self._ends):
            size = float(self._block_tokens)
            self._ends = tuple(size * at for at in range(1, 2 * len(blocks) + 1))
        tokens = request.prompt_tokens * BYTES_PER_TOKEN * self._estimate.tokens_per_byte
        return RequestView(
            prompt_tokens=tokens,
            completion_tokens=self._estimate.view_request(0).completion_tokens,
            prefix=blocks,
            prefix_tokens=self._ends[: len(blocks)],
            session=request.session,
            streamed=True,
        )

    def _place(self, call: Call) -> bool:
        view, now_s = call.view, self._events.now_s
        assert view is not None
        self.fleet.advance(now_s)
        self.index.advance(now_s)
        chosen = self.policy.choose(view, self.fleet)
        if chosen is None:
            return False
        held = self.index.count(chosen, view.prefix)
        self.index.expect(chosen, view.prefix)
        cached = view.prefix_tokens[held - 1] if held else 0.0
        call.placement = self.fleet.place(chosen, view, cached)
        call.attempts += 1
        if not self._owner.give(call, chosen):
            self.fleet.end(call.placement)
            self._owner.over(call, Outcome.FAILED)
        return True

    def _dispatch(self) -> None:
        while (entry := self.queue.peek()) is not None:
            entry.item.entry = None
            if not self._place(entry.item):
                entry.item.entry = entry
                return
            self.queue.pop()

    def _expire(self, entry: QueueEntry[Call]) -> None:
        if entry.item.entry is entry:
            entry.item.entry = None
            self.queue.remove(entry)
            self._owner.over(entry.item, Outcome.LATE)
