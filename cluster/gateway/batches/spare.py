"""Slots of one pool for the lines of batches, as far as other requests leave room.

Without other requests, lines start one after the other until ``max_concurrent`` run. While there
are others, at most ``share`` lines run for each of them: in the worst case, the time per token
grows in proportion to the requests, so this bounds the slowdown. Lines beyond it are stopped and
start again later.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cluster.config import BatchesConfig
from cluster.gateway.pools.pool import Pool
from cluster.metrics import Counter

QUIET_S = 1.0
"""Time without another request after which lines may use the whole pool. Shorter pauses are likely
to end while a line is computed, which is then lost work."""
PLACEMENT_S = 0.2
"""Longest time for which a line that was started and has no place at a replica yet, such as one
whose guards are slow, keeps others from starting."""


@dataclass(slots=True, eq=False)
class LineSlot:
    """Permission to run one line."""

    is_urgent: bool
    """True if the line is not stopped for other requests."""
    granted_s: float
    """Time of the permission, in seconds."""
    on_placed: Callable[[], None]
    """Called when the line gets its place at a replica."""
    is_placed: bool = False
    """True once the line has had a place at a replica."""
    task: asyncio.Task[object] | None = None
    """Task to cancel if the line must stop."""
    is_stopped: bool = False
    """True once the line was stopped for other requests."""

    def place(self) -> None:
        """Note that the line has a place at a replica, so that the next one may start."""
        if not self.is_placed:
            self.is_placed = True
            self.on_placed()


class SpareCapacity:
    """Slots for lines in one pool; ``adjust`` must be called often.

    Args:
        pool: The pool.
        num_elsewhere: Returns the requests at other routers, which may be in this pool.
        preemptions: Counts stopped lines.
    """

    def __init__(self, pool: Pool, num_elsewhere: Callable[[], int], preemptions: Counter) -> None:
        self._pool = pool
        self._num_elsewhere = num_elsewhere
        self._preemptions = preemptions
        self._running: list[LineSlot] = []
        self._waiting: deque[tuple[asyncio.Future[LineSlot], Callable[[], bool]]] = deque()
        self._window = 1.0  # lines that may run without other requests
        self._share = 0.0
        self._allowed = 0  # since the last adjustment
        self._now_s = 0.0
        self._num_arrived = 0
        self._busy_at = float("-inf")
        # At once: an engine that computes the prompt beside the lines takes longer for it.
        pool.meter.on_interactive = self._stop_lines_beside_others

    @property
    def num_running(self) -> int:
        """Lines that have a slot."""
        return len(self._running)

    async def take(self, is_urgent: Callable[[], bool]) -> LineSlot:
        """Wait for a slot; return it with ``release``.

        Args:
            is_urgent: Returns True once the line may run beside other requests, one at a time.
        """
        waiter: asyncio.Future[LineSlot] = asyncio.get_running_loop().create_future()
        self._waiting.append((waiter, is_urgent))
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():  # granted in the same moment
                self.release(waiter.result(), is_finished=False)
            raise
        finally:
            self._waiting = deque(pair for pair in self._waiting if pair[0] is not waiter)

    def release(self, slot: LineSlot, *, is_finished: bool) -> None:
        """Return a slot; ``is_finished`` if its line was answered."""
        self._running.remove(slot)
        if is_finished:  # doubles in the time of one line, as in TCP's slow start
            self._window += 1

    def adjust(self, config: BatchesConfig, now_s: float) -> None:
        """Stop lines that are too many now, and start others if there is room."""
        meter = self._pool.meter
        num_others = meter.num_interactive + self._num_elsewhere()
        if num_others or meter.num_interactive_arrivals != self._num_arrived:
            self._busy_at = now_s
        self._num_arrived = meter.num_interactive_arrivals
        self._window = min(self._window, config.max_concurrent)
        is_quiet = now_s - self._busy_at >= QUIET_S
        self._share = config.share
        self._allowed = int(self._window) if is_quiet else self._beside_others()
        self._now_s = now_s
        self._stop_lines()
        self._start_line()

    def _beside_others(self) -> int:
        # Requests at other routers may be in other pools, so they make no room here.
        return int(self._share * self._pool.meter.num_interactive + 1e-9)

    def _stop_lines_beside_others(self) -> None:
        if self._running:
            self._allowed = self._beside_others()
            self._stop_lines()

    def _stop_lines(self) -> None:
        running = [slot for slot in self._running if not slot.is_stopped]
        excess = len(running) - self._allowed
        stoppable = [slot for slot in running if not slot.is_urgent]
        if excess <= 0 or not stoppable:
            return
        self._window = max(1.0, self._window / 2)
        for slot in reversed(stoppable[-excess:]):  # the newest have done the least
            slot.is_stopped = True
            self._preemptions.add()
            if slot.task is not None:
                slot.task.cancel()

    def _start_line(self) -> None:
        """Start a line if there is room; the next one starts when it has its place."""
        if self._is_placing() or not self._has_room():
            return
        fits = len(self._running) < self._allowed
        has_urgent = any(slot.is_urgent for slot in self._running)
        for waiter, is_urgent in self._waiting:
            is_first_urgent = not has_urgent and is_urgent()
            if not waiter.done() and (fits or is_first_urgent):
                slot = LineSlot(is_first_urgent, self._now_s, self._start_line)
                self._running.append(slot)
                waiter.set_result(slot)
                return

    def _is_placing(self) -> bool:
        """Return True if a line that was started recently has yet to take its place."""
        return any(
            not slot.is_placed and self._now_s - slot.granted_s < PLACEMENT_S
            for slot in self._running
        )

    def _has_room(self) -> bool:
        """Return True if another request would start at once, or would wake the pool."""
        pool = self._pool
        if pool.is_asleep:
            return not self._running
        return bool(pool.replicas.num_ready) and pool.queue.has_room
