"""Monitoring of one replica: cost accounting, memory leaks and devices.

The monitors do not know Ray. This module gives them the replica's name and GPUs, and the key-value
store through which the replicas of a pool take turns at being replaced.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial

import ray
from ray import serve

from cluster.accounting.meter import find_meter
from cluster.accounting.replica import ReplicaAccounting
from cluster.config import ServedPool
from cluster.config.operations import OperationsConfig
from cluster.devices import DeviceWatch, load_nvml
from cluster.engines.base import EngineWorker
from cluster.leaks import Growth, MemoryWatch, ReplacementLease
from cluster.metrics import Registry
from cluster.periodic import Periodic
from cluster.ray_internals import drain_node, kv_exists, kv_put_if_absent, live_nodes

logger = logging.getLogger("ray.serve.tandem")

RENEWALS_PER_PERIOD = 10
"""Renewals of a lease per ``leaks.pause_s`` while the replica drains."""
_SECONDS_PER_HOUR = 3600.0
_GCS_TIMEOUT_S = 5.0
LAST_READING_S = 15.0
"""Limit of a reading before the replica ends, in seconds: two calls of the GCS and NVML's. Serve's
health checks have 30 s."""


class RayKeys:
    """``cluster.leaks.KeyStore`` in the cluster's GCS; each call blocks for a round trip."""

    def put_if_absent(self, key: str, value: str) -> bool:
        return kv_put_if_absent(key.encode(), value.encode())

    def has(self, key: str) -> bool:
        return kv_exists(key.encode())


class ReplicaWatch:
    """All monitors of this replica; call ``close`` at the end.

    Args:
        config: Settings of the monitors.
        pool: Pool of the replica.
        num_in_flight: Returns the replica's requests in flight.
        retire: Drains the replica and has it replaced; takes the reason.
        workers: Workers of the engine in other actors on this node.
        on_demand_bytes: See ``Engine.on_demand_bytes``.
    """

    def __init__(
        self,
        config: OperationsConfig,
        pool: ServedPool,
        num_in_flight: Callable[[], int],
        retire: Callable[[str], Awaitable[None]],
        workers: Sequence[EngineWorker] = (),
        on_demand_bytes: int = 0,
    ) -> None:
        identity = serve.get_replica_context().replica_id
        self._id: str = identity.unique_id
        self._retire = retire
        self._devices = _devices(config, pool.name, workers)
        pids = [worker.pid for worker in workers]
        self.accounts = _accounts(config, pool, self._devices, pids)
        self._memory = MemoryWatch(
            config.leaks, pool.name, num_in_flight, self._on_leak, pids, on_demand_bytes
        )
        deployment = identity.deployment_id
        name = f"{deployment.app_name}/{deployment.name}"
        self._lease = ReplacementLease(RayKeys(), name, config.leaks.pause_s, time.time)
        self._leaks = config.leaks
        self._last_reading: asyncio.Task[None] | None = None
        self._retiring: asyncio.Task[None] | None = None
        self._warned = False

    def reconfigure(self, config: OperationsConfig, pool: ServedPool) -> None:
        """Apply changed settings."""
        self.accounts.set_price(_price_per_s(config, pool))
        if self._devices is not None:
            self._devices.reconfigure(config.devices)
        self._memory.reconfigure(config.leaks)
        self._lease = replace(self._lease, period_s=config.leaks.pause_s)
        self._leaks = config.leaks

    def check(self) -> None:
        """Raise ``DeviceFailedError`` once a device has failed."""
        if self._devices is not None:
            self._devices.check()

    async def read_devices(self) -> None:
        """Read the devices before the replica ends, and have the node drained if needed.

        The replica's successor would not see their faults.
        """
        if self._devices is None:
            return
        if self._last_reading is None or self._last_reading.done():
            self._last_reading = asyncio.create_task(self._devices.read(), name="last reading")
        # A cancelled reading would lose the XIDs that it has taken from NVML.
        await asyncio.wait([self._last_reading], timeout=LAST_READING_S)
        if not self._last_reading.done():
            logger.error("the GPUs' reading or Ray's answer takes over %g s", LAST_READING_S)
        elif self._last_reading.cancelled():  # closed
            return
        elif (error := self._last_reading.exception()) is not None:
            logger.error("could not read the GPUs, or have their node drained", exc_info=error)

    def observe(self, registry: Registry) -> None:
        self.accounts.observe(registry)
        self._memory.observe(registry)
        if self._devices is not None:
            self._devices.observe(registry)

    async def close(self) -> None:
        await self.accounts.close()
        await self._memory.close()
        if self._last_reading is not None:
            self._last_reading.cancel()
        if self._devices is not None:
            await self._devices.close()
        if self._retiring is not None:
            self._retiring.cancel()

    def _on_leak(self, process: str, growth: Growth) -> None:
        if self._retiring is not None and not self._retiring.done():
            return
        rate = f"{process} memory grows by {growth.bytes_per_s / 1024:.0f} KiB/s"
        if self._leaks.replace:
            self._retiring = asyncio.create_task(self._replace(rate), name="leak")
        elif not self._warned:
            self._warned = True
            logger.warning("%s without more traffic; leaks.replace is off", rate)

    async def _replace(self, rate: str) -> None:
        try:
            if not await asyncio.to_thread(self._lease.acquire, self._id):
                logger.info("%s; another replica of the pool is being replaced", rate)
                return
            renew = partial(asyncio.to_thread, self._lease.renew, self._id)
            renewal = Periodic("lease", self._lease.period_s / RENEWALS_PER_PERIOD, renew)
            try:
                await self._retire(rate)
            finally:
                await renewal.close()
        except Exception:  # the GCS is down; the next reading tries again
            logger.exception("%s; could not replace this replica", rate)


def _devices(
    config: OperationsConfig, model: str, workers: Sequence[EngineWorker]
) -> DeviceWatch | None:
    ids = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    # With several workers, the replica's own actor has none of the placement group's GPUs.
    ids = [*ids, *sorted({worker.device for worker in workers if worker.device})]
    nvml = load_nvml() if ids else None
    if nvml is None:
        return None
    try:
        return DeviceWatch(config.devices, model, nvml, ids, _drain_this_node)
    except nvml.NVMLError as error:  # device names that NVML does not know, such as MIG's
        logger.warning("cannot monitor the GPUs %s: %s", ids, error)
        return None


async def _drain_this_node(fault: str) -> bool:
    """Have Ray drain this node, unless it is the head; return False if Ray refuses.

    Raises:
        RayError: The GCS does not answer.
    """
    node_id = ray.get_runtime_context().get_node_id()
    nodes = await asyncio.to_thread(live_nodes, _GCS_TIMEOUT_S)
    is_head = any(node.id == node_id and node.is_head for node in nodes)
    if is_head:
        refusal = "it is the head"
    else:
        refusal = await asyncio.to_thread(drain_node, node_id, fault, _GCS_TIMEOUT_S)
    if refusal:
        logger.error("%s; node %s is not drained: %s", fault, node_id, refusal)
    else:
        logger.warning("%s; node %s drains", fault, node_id)
    return is_head or not refusal


def _accounts(
    config: OperationsConfig,
    pool: ServedPool,
    devices: DeviceWatch | None,
    workers: Sequence[int],
) -> ReplicaAccounting:
    accounting, resources = config.accounting, pool.resources
    joules = devices.joules if devices is not None else None
    if joules is not None and resources.gpus < 1:  # the device is shared, and so is its energy
        joules = _scaled(joules, resources.gpus)
    meter = find_meter(accounting, joules, gpus_reserved=resources.gpus > 0, workers=workers)
    price_per_s = _price_per_s(config, pool)
    return ReplicaAccounting(pool.name, meter, price_per_s, accounting.interval_s)


def _price_per_s(config: OperationsConfig, pool: ServedPool) -> float:
    per_hour = config.accounting.price_per_hour(pool.resources.cpus, pool.resources.gpus)
    return pool.num_workers * per_hour / _SECONDS_PER_HOUR


def _scaled(joules: Callable[[], float], share: float) -> Callable[[], float]:
    return lambda: share * joules()
