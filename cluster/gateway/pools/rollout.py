"""Two versions of one model in one router, while a rollout replaces the old one.

A session keeps its version. If the new version answers with an error, the old one answers instead,
so that clients do not see the faults of a candidate. Copies of requests let the new version prove
itself without clients; their number is limited.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from cluster.admission import MIN_PRIORITY, OPEN
from cluster.config import RolloutConfig
from cluster.errors import LinkError, OverloadedError, RequestError
from cluster.gateway.messages import Body, Request, Response
from cluster.gateway.pools.labels import compare_labels
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.relay import relay
from cluster.gateway.pools.slots import Claim
from cluster.gateway.recording.observer import OnEnd
from cluster.gateway.recording.request_log import ABANDONED
from cluster.metrics import Registry, table
from cluster.rollout import Figures, RolloutState, Totals, takes_candidate
from cluster.usage import Usage

logger = logging.getLogger("ray.serve.tandem")

COPY_SHARE = 0.1
"""Share of the requests to the old version that are copied."""
MAX_COPIES = 4
"""Copies in flight at a time, per router."""
MAX_COPY_BYTES = 256 * 1024
"""Size of the largest body that is copied, and of an answer whose labels are compared."""
COPY_TIMEOUT_S = 120.0


@dataclass(slots=True)
class _Attempt:
    """End of a request at the new version, which is not final if the old one answers instead."""

    on_end: OnEnd
    is_final: bool = False
    end: tuple[int, Usage | None, bool] | None = None

    def __call__(self, status: int, usage: Usage | None, had_slot: bool) -> None:
        if self.is_final or status < 400 or status in ABANDONED:
            self.on_end(status, usage, had_slot)
        else:
            self.end = status, usage, had_slot

    def finish(self) -> None:
        """Make the end final."""
        self.is_final = True
        if self.end is not None:
            self.on_end(*self.end)


class Rollout:
    """Division of a pool's requests between its versions."""

    def __init__(
        self,
        old: Pool,
        new: Pool,
        rule: RolloutConfig,
        registry: Registry,
    ) -> None:
        self.old = old
        self.new = new
        self.version = rule.version
        self._rule = rule
        self._share = 0.0
        self._is_shadowed = False
        self.draw: Callable[[], float] = random.random
        """Number from 0 to 1; a request is copied if it is below ``COPY_SHARE``."""
        self._copies: set[asyncio.Task[None]] = set()
        self._compared = self._agreed = 0
        self._gauge = registry.gauge(table.ROLLOUT_SHARE, old.name)
        self._retries = registry.counter(table.ROLLOUT_RETRIES, old.name)
        self._outcomes = {
            outcome: registry.counter(table.ROLLOUT_COPIES, old.name, outcome)
            for outcome in ("answered", "failed", "skipped")
        }
        self._labels = {
            result: registry.counter(table.ROLLOUT_LABELS, old.name, result)
            for result in ("agreed", "differed")
        }

    def update(self, state: RolloutState | None) -> None:
        """Follow the decider; a state of another rollout is ignored."""
        if state is not None and state.is_of(self._rule):
            self._share, self._is_shadowed = state.share, state.is_shadowed
            self._gauge.value = state.share / 100
            if state.phase == "rolled_back":
                self.new.queue.close()  # the old version answers what waits there

    def totals(self) -> Totals:
        """Return the figures of both versions at this router since it started."""
        labels = Figures(compared=self._compared, agreed=self._agreed)
        return Totals(_figures(self.old), _figures(self.new) + labels)

    async def relay(self, request: Request, claim: Claim, on_end: OnEnd) -> Response:
        """Relay a request to one of the versions; see ``relay.relay``."""
        if claim.joins is not None:
            joined = self.new if self.new.replicas.has(claim.joins) else self.old
            return await relay(request, joined, claim, on_end)
        if self._select(request, claim) is self.new:
            return await self._relay_new(request, claim, on_end)
        copy = self._make_copy(request)
        response = await relay(request, self.old, claim, on_end)
        if copy is not None:
            self._start_copy(copy, claim, response)
        return response

    async def close(self) -> None:
        """Cancel the copies."""
        copies = list(self._copies)
        for copy in copies:
            copy.cancel()
        await asyncio.gather(*copies, return_exceptions=True)

    def _select(self, request: Request, claim: Claim) -> Pool:
        session = claim.view.session
        key = request.id if session is None else f"{request.tenant}\0{session}"
        is_new = takes_candidate(self.version, key, self._share)
        chosen, other = (self.new, self.old) if is_new else (self.old, self.new)
        # A version without replicas gets requests only if the other has none, too.
        is_open = self._share > 0 and other.replicas.num_ready and not chosen.replicas.num_ready
        return other if is_open else chosen

    @property
    def _may_ask_old(self) -> bool:
        """True if the old version can answer what the new one could not."""
        return bool(self.old.replicas.num_ready) or self._share == 0  # after a rollback, soon

    async def _relay_new(self, request: Request, claim: Claim, on_end: OnEnd) -> Response:
        attempt = _Attempt(on_end)
        try:
            # Relaying drops the body of its request, which the old version may need.
            response = await relay(replace(request), self.new, claim, attempt)
        except RequestError as error:
            status = error.status
            if status in ABANDONED or not self._may_ask_old:
                attempt.finish()
                raise
        else:
            status = response.status
            if status < 400 or not self._may_ask_old:
                attempt.finish()
                request.release_body()
                return response
            try:
                async for _ in response.body:  # an error, which is here already
                    pass
            except BaseException:
                attempt.finish()
                raise
        self._retries.add()
        logger.info(
            "%s: %s answered with status %d; asking the old version",
            *(request.id, self.new.name, status),
        )
        response = await relay(request, self.old, self.old.renew_claim(claim), on_end)
        # The meter counts server errors; other ones are faults if the old version has none.
        if response.status < 400 <= status < 500 and status != OverloadedError.status:
            self.new.meter.num_failed += 1
        return response

    # -- copies --

    def _make_copy(self, request: Request) -> Request | None:
        """Return a copy of the request if it shall have one."""
        # Only copies show whether two classifiers agree.
        is_wanted = self._is_shadowed or (self._share > 0 and self.new.kind == "classifier")
        if not is_wanted or request.method != "POST" or self.draw() >= COPY_SHARE:
            return None
        is_possible = (
            len(self._copies) < MAX_COPIES
            and len(request.body) <= MAX_COPY_BYTES
            and self.new.replicas.num_ready
        )
        if not is_possible:
            self._outcomes["skipped"].add()
            return None
        # No tenant is charged, and no key finds this answer.
        return replace(request, identity=OPEN, answer_key=None, is_copy=True)

    def _start_copy(self, copy: Request, claim: Claim, response: Response) -> None:
        tee: _Tee | None = None
        if self.new.kind == "classifier" and response.status == 200:
            response.body = tee = _Tee(response.body)
        now_s = asyncio.get_running_loop().time()
        copied = replace(
            self.new.renew_claim(claim),
            identity=OPEN,
            priority=MIN_PRIORITY,
            is_retry=False,
            expires_s=now_s + COPY_TIMEOUT_S,
            deadline_s=now_s + COPY_TIMEOUT_S,
        )
        task = asyncio.create_task(self._run_copy(copy, copied, tee))
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _run_copy(self, copy: Request, claim: Claim, tee: "_Tee | None") -> None:
        content = bytearray()
        try:
            response = await relay(copy, self.new, claim, ignore_end)
            async with aclosing(response.body) as body:
                async for chunk in body:
                    if tee is not None and len(content) <= MAX_COPY_BYTES:
                        content += chunk
            self._outcomes["answered" if response.status < 400 else "failed"].add()
            if tee is not None and response.status == 200:
                async with asyncio.timeout(COPY_TIMEOUT_S):
                    self._compare(await tee.content, bytes(content))
        except (LinkError, RequestError, TimeoutError) as error:
            self._outcomes["failed"].add()
            logger.info("%s: copy failed: %s", copy.id, error)

    def _compare(self, old: bytes | None, new: bytes) -> None:
        if old is None or len(new) > MAX_COPY_BYTES:
            return
        compared, agreed = compare_labels(old, new)
        self._compared += compared
        self._agreed += agreed
        self._labels["agreed"].add(agreed)
        self._labels["differed"].add(compared - agreed)


class _Tee:
    """Body that keeps what passes, up to a limit, for the comparison with a copy's answer."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self._kept = bytearray()
        self.content: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        """Set at the end; None if the body is incomplete or too large."""

    def __aiter__(self) -> "_Tee":
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await anext(self._body)
        except StopAsyncIteration:
            is_complete = len(self._kept) <= MAX_COPY_BYTES
            self._set(bytes(self._kept) if is_complete else None)
            raise
        except BaseException:
            self._set(None)
            raise
        if len(self._kept) <= MAX_COPY_BYTES:
            self._kept += chunk
        return chunk

    async def aclose(self) -> None:
        self._set(None)
        await self._body.aclose()

    def _set(self, content: bytes | None) -> None:
        if not self.content.done():
            self.content.set_result(content)


def ignore_end(_status: int, _usage: Usage | None, _had_slot: bool) -> None:
    """Accept the end of a copy or a check, which belongs to no tenant."""


def _figures(pool: Pool) -> Figures:
    meter = pool.meter
    meter.count_gaps()
    return Figures(
        finished=meter.num_finished,
        failed=meter.num_failed,
        lengths=meter.num_with_usage,
        tokens=meter.completion_tokens.value,
        squared_tokens=meter.squared_tokens,
        ttft=tuple(meter.ttft_s.counts),
        itl=tuple(meter.itl_s.counts),
        latency=tuple(meter.request_s.counts),
    )
