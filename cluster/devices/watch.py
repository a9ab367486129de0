"""Periodic readings of a replica's GPUs."""

import asyncio
from collections.abc import Callable, Sequence

from cluster.config.operations import DevicesConfig
from cluster.devices.health import DeviceHealth
from cluster.devices.nvml import Nvml, NvmlReader
from cluster.metrics import Registry
from cluster.periodic import Periodic


class DeviceWatch:
    """Devices of one replica; call ``close`` at the end.

    Args:
        config: Reading interval and definition of a failure.
        model: Name of the pool.
        nvml: The initialized library.
        ids: Devices; see ``NvmlReader``.

    Raises:
        nvml.NVMLError: There is no such device.
    """

    def __init__(self, config: DevicesConfig, model: str, nvml: Nvml, ids: Sequence[str]) -> None:
        self._reader = NvmlReader(nvml, ids)
        self._health = DeviceHealth(config, model)
        self._periodic = Periodic("device watch", config.interval_s, self.read)

    @property
    def joules(self) -> Callable[[], float] | None:
        """Running sum of the devices' energy in joules; None if they do not count it."""
        return self._reader.joules if self._reader.counts_energy() else None

    async def read(self) -> None:
        """Read all devices."""
        self._health.add_readings(await asyncio.to_thread(self._reader.read))

    def check(self) -> None:
        """Raise ``DeviceFailedError`` if a device has failed."""
        self._health.check()

    def observe(self, registry: Registry) -> None:
        """Write the last readings to the registry."""
        self._health.observe(registry)

    async def close(self) -> None:
        """Stop reading."""
        await self._periodic.close()
        self._reader.close()
