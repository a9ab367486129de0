"""What watches one replica beside its work: accounts, memory and devices.

Each part knows neither Ray nor the others; here they get what Ray knows of the replica: its
name, its GPUs, and the store by which the replicas of a pool agree whose turn it is.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import ray
from ray import serve
from ray.experimental import internal_kv

from cluster.accounting.meter import find_meter
from cluster.accounting.replica import ReplicaAccounting
from cluster.config import ClassifierConfig, GeneratorConfig
from cluster.config.operations import OperationsConfig
from cluster.devices import DeviceWatch, load_nvml
from cluster.leaks import Growth, MemoryWatch, ReplacementLease
from cluster.metrics import Registry

logger = logging.getLogger("ray.serve.tandem")

_NAMESPACE = b"tandem"
_SECONDS_PER_HOUR = 3600.0


class RayKeys:
    """``cluster.leaks.KeyStore`` in the cluster's GCS; each call blocks for one round trip."""

    def put_if_absent(self, key: str, value: str) -> bool:
        """See ``KeyStore``."""
        # GCS says whether the key was there before.
        return not internal_kv._internal_kv_put(key, value, overwrite=False, namespace=_NAMESPACE)

    def has(self, key: str) -> bool:
        """See ``KeyStore``."""
        return bool(internal_kv._internal_kv_exists(key, namespace=_NAMESPACE))


class ReplicaWatch:
    """Watches this replica; ``close`` is due.

    Args:
        config: What is watched, and how.
        pool: The pool that it is a replica of.
        ongoing: How many requests it is serving.
        retire: Drains it and has it replaced.
    """

    def __init__(
        self,
        config: OperationsConfig,
        pool: GeneratorConfig | ClassifierConfig,
        ongoing: Callable[[], int],
        retire: Callable[[str], Awaitable[None]],
    ) -> None:
        identity = serve.get_replica_context().replica_id
        self._id: str = identity.unique_id
        self._retire = retire
        self._devices = _devices(config, pool.name)
        self.accounts = _accounts(config, pool, self._devices)
        self._memory = MemoryWatch(config.leaks, pool.name, ongoing, self._on_leak)
        deployment = identity.deployment_id
        name = f"{deployment.app_name}/{deployment.name}"
        self._lease = ReplacementLease(RayKeys(), name, config.leaks.pause_s, time.time)
        self._replaces = config.leaks.replace
        self._retiring: asyncio.Task[None] | None = None
        self._warned = False

    def check(self) -> None:
        """Raise ``DeviceFailedError`` once a device has failed."""
        if self._devices is not None:
            self._devices.check()

    def observe(self, registry: Registry) -> None:
        """Write what was seen into the registry."""
        self.accounts.observe(registry)
        self._memory.observe(registry)
        if self._devices is not None:
            self._devices.observe(registry)

    async def close(self) -> None:
        """End the watching."""
        await self.accounts.close()
        await self._memory.close()
        if self._devices is not None:
            await self._devices.close()
        if self._retiring is not None:
            self._retiring.cancel()

    def _on_leak(self, process: str, growth: Growth) -> None:
        if self._retiring is not None and not self._retiring.done():
            return
        rate = f"{process} memory grows by {growth.bytes_per_s / 1024:.0f} KiB/s"
        if self._replaces:
            self._retiring = asyncio.create_task(self._replace(rate), name="leak")
        elif not self._warned:
            self._warned = True
            logger.warning("%s and the traffic does not; leaks.replace is off", rate)

    async def _replace(self, rate: str) -> None:
        if await asyncio.to_thread(self._lease.acquire, self._id):
            await self._retire(rate)
        else:
            logger.info("%s; another replica of the pool is being replaced", rate)


def _devices(config: OperationsConfig, model: str) -> DeviceWatch | None:
    ids = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    nvml = load_nvml() if ids else None
    if nvml is None:
        return None
    try:
        return DeviceWatch(config.devices, model, nvml, ids)
    except nvml.NVMLError as error:  # other names for devices than NVML's, such as MIG's
        logger.warning("the GPUs %s cannot be watched: %s", ids, error)
        return None


def _accounts(
    config: OperationsConfig,
    pool: GeneratorConfig | ClassifierConfig,
    devices: DeviceWatch | None,
) -> ReplicaAccounting:
    accounting, resources = config.accounting, pool.resources
    workers = pool.num_workers if isinstance(pool, GeneratorConfig) else 1
    per_hour = accounting.price_per_hour(resources.cpus, resources.gpus)
    joules = devices.joules if devices is not None else None
    if joules is not None and resources.gpus < 1:  # the device is shared; so is what it uses
        joules = _part(joules, resources.gpus)
    meter = find_meter(accounting, joules, gpus_reserved=resources.gpus > 0)
    price_per_s = workers * per_hour / _SECONDS_PER_HOUR
    return ReplicaAccounting(pool.name, meter, price_per_s, accounting.interval_s)


def _part(joules: Callable[[], float], share: float) -> Callable[[], float]:
    return lambda: share * joules()
