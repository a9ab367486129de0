"""Periodic readings of a replica's GPUs."""

import asyncio
from collections.abc import Callable, Sequence

from cluster.config.operations import DevicesConfig
from cluster.devices.health import DeviceHealth
from cluster.devices.nvml import Nvml, NvmlReader
from cluster.periodic import Periodic


class DeviceWatch(DeviceHealth):
    """Devices of one replica, read periodically; call ``close`` at the end.

    Raises:
        nvml.NVMLError: There is no such device.
    """

    def __init__(self, config: DevicesConfig, model: str, nvml: Nvml, ids: Sequence[str]) -> None:
        super().__init__(config, model)
        self._reader = NvmlReader(nvml, ids)
        self._periodic = Periodic("device watch", config.interval_s, self.read)

    @property
    def joules(self) -> Callable[[], float] | None:
        """Running sum of the devices' energy in joules; None if they do not count it."""
        return self._reader.joules if self._reader.counts_energy() else None

    def reconfigure(self, config: DevicesConfig) -> None:
        """Apply changed settings."""
        self.config = config
        self._periodic.period_s = config.interval_s

    async def read(self) -> None:
        self.add_readings(await asyncio.to_thread(self._reader.read))

    async def close(self) -> None:
        await self._periodic.close()
        self._reader.close()
