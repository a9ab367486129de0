"""One replica: its engine, whose steps are events, and the requests that it was given."""

import math
from typing import Protocol

from cluster.config import SimConfig
from cluster.simulation.calls import Call
from cluster.simulation.engine import Engine, Sequence
from cluster.simulation.events import Events


class Owner(Protocol):
    """Hears what happens at the replicas."""

    def first_token(self, call: Call) -> None:
        """The first token of a request is there."""

    def ended(self, call: Call, replica: "Replica") -> None:
        """The last one is."""

    def cache_changed(self, replica: "Replica", stored: list[int], removed: list[int]) -> None:
        """Blocks were stored, and others removed."""


class Replica:
    """A replica from the moment at which its start was asked for."""

    def __init__(
        self, number: int, config: SimConfig, block_tokens: int, events: Events, owner: Owner
    ) -> None:
        self.number = number
        self.id = f"r{number:04d}"
        self.engine = Engine(config, block_tokens, self)
        self.calls: dict[Sequence, Call] = {}
        self.asked_s = events.now_s
        self.ready_s = math.inf
        self.ended_s = math.inf
        self.is_leaving = self.is_hung = False
        self.ongoing_s = 0.0
        """The sum of the times that its requests were there."""
        self.work_s = 0.0
        """What its requests take of an engine that has nothing else to do."""
        self._config = config
        self._events, self._owner = events, owner
        self._scheduled_s = math.inf

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self.ready_s <= self._events.now_s < self.ended_s and not self.is_leaving

    def give(self, call: Call) -> bool:
        """Take a request; False: it can never fit."""
        sequence = Sequence(call.request)
        self.calls[sequence] = call
        try:
            self.engine.add(sequence, self._events.now_s)
        except ValueError:
            del self.calls[sequence]
            return False
        self.ongoing_s -= self._events.now_s
        self._after_step()
        return True

    def end(self) -> list[Call]:
        """End now; returns the requests that were there."""
        left = list(self.calls.values())
        self.engine.stop()
        self.calls.clear()
        self.ended_s = self._events.now_s
        self.ongoing_s += len(left) * self.ended_s
        return left

    def first_token(self, sequence: Sequence, now_s: float) -> None:
        """The engine's."""
        call = self.calls[sequence]
        call.cached_tokens = sequence.cached_tokens or 0
        computed = call.request.prompt_tokens - call.cached_tokens
        self.work_s += computed * self._config.prefill_s_per_token
        self._owner.first_token(call)

    def ended(self, sequence: Sequence, now_s: float) -> None:
        """The engine's."""
        call = self.calls.pop(sequence)
        self.ongoing_s += now_s
        # Of a step, each stream of a usual batch is this much.
        each_s = self._config.decode_s_per_token * self._config.batch_slowdown
        self.work_s += call.request.completion_tokens * each_s
        self._owner.ended(call, self)

    def _step(self, due_s: float) -> None:
        if due_s != self.engine.due_s or self.is_hung:
            return
        self._scheduled_s = math.inf
        self.engine.commit()
        self._after_step()

    def _after_step(self) -> None:
        stored, removed = self.engine.changes()
        if stored or removed:
            self._owner.cache_changed(self, stored, removed)
        due_s = self.engine.due_s
        if due_s != self._scheduled_s and due_s != math.inf:
            self._scheduled_s = due_s
            self._events.at(due_s, self._step, due_s)
