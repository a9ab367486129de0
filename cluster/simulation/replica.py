"""One simulated replica: an engine whose steps are events, and the requests placed on it."""

import math
from typing import TYPE_CHECKING

from cluster.simulation.engine_model import EngineModel, Sequence
from cluster.simulation.requests import SimulatedRequest

if TYPE_CHECKING:
    from cluster.simulation.simulator import Simulation


class SimulatedReplica:
    """A replica, from the decision to start it until its end."""

    def __init__(self, number: int, simulation: "Simulation") -> None:
        config, events = simulation.settings.engine, simulation.events
        block_tokens = simulation.trace.block_tokens
        self.id = f"r{number:04d}"
        self.engine = EngineModel(config, block_tokens, self._first_token, self._ended)
        self.requests: dict[Sequence, SimulatedRequest] = {}
        self.requested_s = events.now_s
        self.ready_s = math.inf
        self.ended_s = math.inf
        self.is_draining = self.is_hung = False
        self.in_flight_s = 0.0
        """Sum of the times that requests spent here."""
        self.work_s = 0.0
        """Time that the requests would take on an otherwise idle engine."""
        self._config = config
        self._events, self._simulation = events, simulation
        self._scheduled_s = math.inf

    @property
    def is_ready(self) -> bool:
        return self.ready_s <= self._events.now_s < self.ended_s and not self.is_draining

    def add_request(self, request: SimulatedRequest) -> bool:
        """Add a request; return False if it does not fit into the KV cache."""
        sequence = Sequence(request.spec)
        try:
            self.engine.add(sequence, self._events.now_s)
        except ValueError:
            return False
        self.requests[sequence] = request
        self.in_flight_s -= self._events.now_s
        self._after_step()
        return True

    def end(self) -> list[SimulatedRequest]:
        """End now and return the unfinished requests."""
        left = list(self.requests.values())
        self.engine.stop()
        self.requests.clear()
        self.ended_s = self._events.now_s
        self.in_flight_s += len(left) * self.ended_s
        return left

    def _first_token(self, sequence: Sequence, now_s: float) -> None:
        request = self.requests[sequence]
        request.cached_tokens = sequence.cached_tokens or 0
        uncached_tokens = request.spec.prompt_tokens - request.cached_tokens
        self.work_s += uncached_tokens * self._config.prefill_s_per_token
        self._simulation.first_token(request)

    def _ended(self, sequence: Sequence, now_s: float) -> None:
        request = self.requests.pop(sequence)
        self.in_flight_s += now_s
        # The part of a step that one more stream adds in a usual batch.
        token_s = self._config.decode_s_per_token * self._config.batch_slowdown
        self.work_s += request.spec.completion_tokens * token_s
        self._simulation.request_done(request, self)

    def _step(self, due_s: float) -> None:
        if due_s != self.engine.due_s or self.is_hung:
            return
        self._scheduled_s = math.inf
        self.engine.commit()
        self._after_step()

    def _after_step(self) -> None:
        stored, evicted = self.engine.take_block_changes()
        if stored or evicted:
            self._simulation.cache_changed(self, stored, evicted)
        due_s = self.engine.due_s
        if due_s != self._scheduled_s and due_s != math.inf:
            self._scheduled_s = due_s
            self._events.schedule(due_s, self._step, due_s)
