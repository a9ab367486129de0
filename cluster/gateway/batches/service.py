"""A router's part in batches: it runs all open batches while it has the lease."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import get_args

from cluster.admission import Identity
from cluster.batches import Batch, BatchStore, StoreError
from cluster.batches.types import FINAL, Status
from cluster.config import RouterConfig
from cluster.errors import RequestError
from cluster.gateway.batches.runner import RETRY_S, BatchRun, RunnerTools
from cluster.gateway.batches.spare import SpareCapacity
from cluster.gateway.batches.threads import BatchThreads
from cluster.gateway.messages import Request, Response
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.selection import select_pool
from cluster.metrics import Registry, table
from cluster.periodic import Periodic
from cluster.routing import RequestBody

logger = logging.getLogger("ray.serve.tandem")

CHECK_S = 1.0
"""Interval of renewing the lease and looking for changed batches."""
LEASE_S = 6.0
"""Time after which another router takes over the batches of one that was lost."""
ADJUST_S = 0.02
"""Interval of adjusting the lines to other requests, while there are lines."""
CLEAN_S = 3600.0
MAX_RUNS = 4
"""Batches of one tenant that run at once, oldest first; each holds lines in memory."""
_DAY_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class BatchBackend:
    """The router for which batches run."""

    relay: Callable[[Request], Awaitable[Response]]
    """``Gateway.relay``."""
    pools: Mapping[str, Pool]
    """Pools by the name that clients use."""
    registry: Registry
    find_identity: Callable[[str, str], Identity]
    num_elsewhere: Callable[[], int]
    """Returns the requests at the other routers."""
    currency: Callable[[], str | None]
    """Returns the currency of costs; None without prices."""


class BatchService:
    """Files and batches of one router; call ``start`` in its event loop, and ``close``.

    Args:
        store: Files and batches of all routers.
        config: Section of the router.
        router_id: Id of this router, unique over restarts.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        store: BatchStore,
        config: RouterConfig,
        router_id: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self.threads = BatchThreads()
        self.config = config
        self.clock = clock
        self._router_id = router_id
        self._runs: dict[str, tuple[BatchRun, asyncio.Task[None]]] = {}
        self._spares: dict[str, SpareCapacity] = {}
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._adjusting: asyncio.Task[None] | None = None
        self._cleaning: Periodic | None = None
        self._backend: BatchBackend | None = None

    @property
    def backend(self) -> BatchBackend:
        assert self._backend is not None  # the gateway binds itself
        return self._backend

    def bind(self, backend: BatchBackend) -> None:
        """Set the router; its gateway does this."""
        self._backend = backend
        counter = backend.registry.counter
        self._spares = {
            name: SpareCapacity(pool, backend.num_elsewhere, counter(table.BATCH_PREEMPTIONS, name))
            for name, pool in backend.pools.items()
        }
        self._lines = {good: counter(table.BATCH_LINES, _OUTCOMES[good]) for good in _OUTCOMES}
        backend.registry.on_collect(self._export_running)

    def start(self) -> None:
        """Run open batches from now on."""
        self._loop = asyncio.create_task(self._run(), name="tandem-batches")
        self._cleaning = Periodic("cleaning of batches", CLEAN_S, self._clean)

    def reconfigure(self, config: RouterConfig) -> None:
        """Apply changed settings; those of a running batch stay, but for its share."""
        self.config = config

    def wake(self) -> None:
        """Look for changed batches now."""
        self._wake.set()

    async def stop(self) -> None:
        """Stop the lines and pass the batches on to another router."""
        if self._loop is None:
            return
        if self._cleaning is not None:
            await self._cleaning.close()
        self._loop.cancel()
        await asyncio.wait([self._loop])
        await self._stop_runs()
        self._loop = None
        try:
            if self.store.exists:
                await self.threads.run(self.store.drop_lease, self._router_id)
        except (StoreError, OSError) as error:
            logger.warning("batches: the lease stays until it expires: %s", error)

    async def close(self) -> None:
        """Stop, and end the threads and the connections to the database."""
        await self.stop()
        self.threads.close()
        self.store.close()

    async def _run(self) -> None:
        is_failing = False
        while True:
            try:
                await self._check()
                is_failing = False
            except Exception:  # above all of the database
                if not is_failing:
                    logger.exception("batches: looking for changes failed; retrying")
                is_failing = True  # the runs wait, too, until they can store their results
            self._wake.clear()
            try:
                async with asyncio.timeout(CHECK_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _check(self) -> None:
        """Renew the lease; start new batches, and stop cancelled and expired ones."""
        batches = await self.threads.run(self.store.open_batches) if self.store.exists else []
        now, take = self.clock(), self.store.take_lease
        if batches and not await self.threads.run(take, self._router_id, now, LEASE_S):
            batches = []
            await self._stop_runs()
        self._export_batches(batches)
        num_runs = Counter(batch.tenant for batch in batches if batch.id in self._runs)
        for batch in batches:
            must_end = batch.status == "cancelling" or now >= batch.expires_at
            if batch.id in self._runs:
                if must_end:
                    self._runs[batch.id][0].stop()
            elif must_end or num_runs[batch.tenant] < MAX_RUNS:
                num_runs[batch.tenant] += 1
                self._start_run(batch)
        if self._runs and (self._adjusting is None or self._adjusting.done()):
            self._adjusting = asyncio.create_task(self._adjust())

    def _start_run(self, batch: Batch) -> None:
        backend = self.backend
        tools = RunnerTools(
            store=self.store,
            threads=self.threads,
            relay=backend.relay,
            find_spare=self._find_spare,
            find_identity=backend.find_identity,
            list_models=self.list_models,
            clock=self.clock,
            count_line=lambda is_success: self._lines[is_success].add(),
        )
        run = BatchRun(batch, tools, self.config)
        if self.clock() >= batch.expires_at:
            run.stop()
        task = asyncio.create_task(self._run_batch(batch.id, run), name=f"tandem-{batch.id}")
        self._runs[batch.id] = run, task

    async def _run_batch(self, id_: str, run: BatchRun) -> None:
        try:
            await run.run()
        except Exception:  # above all of the database; the next check starts it again
            logger.exception("batch %s failed; it continues in %g s", id_, RETRY_S)
            await asyncio.sleep(RETRY_S)
        finally:
            del self._runs[id_]

    async def _stop_runs(self) -> None:
        tasks = [task for _, task in self._runs.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def list_models(self, allowed: tuple[str, ...] | None) -> list[str]:
        """Return the names of the models, of those that a key allows."""
        return [
            name
            for pool in self.backend.pools.values()
            for name in pool.models
            if allowed is None or not set(allowed).isdisjoint(pool.names_of(name))
        ]

    def _find_spare(self, path: str, model: str | None) -> SpareCapacity | None:
        try:
            pool = select_pool(self.backend.pools, path, RequestBody(model=model))
        except RequestError:  # its answer says why
            return None
        return self._spares[pool.name]

    async def _adjust(self) -> None:
        loop = asyncio.get_running_loop()
        while self._runs:
            for spare in self._spares.values():
                spare.adjust(self.config.batches, loop.time())
            await asyncio.sleep(ADJUST_S)

    async def _clean(self) -> None:
        if not self.store.exists:
            return
        now = self.clock()
        oldest = now - self.config.batches.keep_days * _DAY_S
        await self.threads.run(self.store.delete_old, now, oldest)

    def _export_batches(self, batches: list[Batch]) -> None:
        counts = Counter(batch.status for batch in batches)
        for status in get_args(Status):
            if status not in FINAL:
                self.backend.registry.gauge(table.BATCHES, status).value = counts[status]

    def _export_running(self) -> None:
        for name, spare in self._spares.items():
            gauge = self.backend.registry.gauge(table.BATCH_LINES_RUNNING, name)
            gauge.value = spare.num_running


_OUTCOMES = {True: "completed", False: "failed"}
