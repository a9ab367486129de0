"""Hedged requests: a second try at another replica for a classification that takes unusually long.

The first answer wins, the other try is cancelled. Only the winner is recorded and charged.
"""

import asyncio
from dataclasses import replace
from functools import partial

from cluster.errors import LinkError, RequestError, UnavailableError
from cluster.gateway.messages import Request, Response
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.relayed_body import Race, RelayedBody
from cluster.gateway.pools.slots import Slot
from cluster.gateway.recording.observer import HedgeOutcome, RequestObserver
from cluster.link import RequestHead


class HedgedRequest(Race):
    """One request, which is sent to a second replica if the first does not answer in time."""

    def __init__(
        self, pool: Pool, request: Request, observer: RequestObserver, head: RequestHead
    ) -> None:
        super().__init__()
        self._pool = pool
        self._request = request
        self._observer = observer
        self._head = head
        self._second: asyncio.Task[Response] | None = None

    async def open(self, slot: Slot) -> Response:
        """Send the request to the slot's replica, and perhaps to another; return the response.

        Raises:
            LinkError, RequestError: As ``RelayedBody.open`` of the first try; the second failed,
                too, or there was none.
        """
        hedger, loop = self._pool.hedger, asyncio.get_running_loop()
        work_tokens, began_s = slot.claim.work_tokens, loop.time()
        hedger.add_request(work_tokens)
        delay_s = hedger.delay_s(work_tokens)
        timer = None if delay_s is None else loop.call_later(delay_s, self._try_second, slot)
        first = RelayedBody(self._pool, slot, self._request, self._observer, self)
        self.runners.append(first)
        try:
            try:
                response = await first.open(self._head, self._request.body)
            except (LinkError, UnavailableError):
                second = await self._await_second()
                if second is None:
                    raise
                response = second
        except asyncio.CancelledError:
            if self.winner is not None and self.winner is not first:  # its response is not returned
                self._observer.ends_later = True
                await self.winner.aclose()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if self._second is not None:
                self._second.cancel()
        hedger.observe(work_tokens, loop.time() - began_s)
        return response

    def win(self, runner: RelayedBody) -> bool:
        """Record the winner, if there are two tries."""
        is_first_answer = self.winner is None
        has_won = super().win(runner)
        if is_first_answer and len(self.runners) > 1:
            outcome: HedgeOutcome = "lost" if runner is self.runners[0] else "won"
            self._pool.meter.hedged(outcome)
            self._observer.hedged(outcome, runner.replica_id)
        return has_won

    async def _await_second(self) -> Response | None:
        """Return the response of the second try; None without a good answer."""
        if self._second is None:
            return None
        try:
            return await self._second
        except (LinkError, RequestError):
            return None

    def _try_second(self, slot: Slot) -> None:
        pool, claim = self._pool, slot.claim
        if not pool.hedger.may_hedge(claim.work_tokens) or slot.replica.state != "linked":
            return
        # A trial or an avoided replica would be no remedy: a retry is no trial, and a move gets no
        # avoided replica.
        excluded = frozenset({slot.replica.info.id})
        other = replace(claim, excluded=excluded, is_retry=True, is_move=True)
        second_slot = pool.queue.take_free_slot(other)
        if second_slot is None:
            return
        pool.hedger.count_hedge(claim.work_tokens)
        second = RelayedBody(pool, second_slot, self._request, self._observer, self)
        self.runners.append(second)
        self._second = asyncio.ensure_future(second.open(self._head, self._request.body))
        self._second.add_done_callback(partial(_drop_failed, second))


def _drop_failed(second: RelayedBody, task: "asyncio.Task[Response]") -> None:
    if task.cancelled() or task.exception() is not None:
        second.drop()  # a task that is cancelled before it has begun does not do it
