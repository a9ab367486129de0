"""Reads a replica's GPUs every few seconds; nothing is here where it has none."""

import asyncio
from collections.abc import Callable, Sequence

from cluster.config.operations import DevicesConfig
from cluster.devices.health import DeviceHealth
from cluster.devices.nvml import Nvml, NvmlReader
from cluster.metrics import Registry
from cluster.periodic import Periodic


class DeviceWatch:
    """The devices of one replica; ``close`` is due.

    Args:
        config: How often, and what is a failure.
        model: The pool's name.
        nvml: The library, initialized.
        ids: As of ``NvmlReader``.

    Raises:
        nvml.NVMLError: there is no such device.
    """

    def __init__(self, config: DevicesConfig, model: str, nvml: Nvml, ids: Sequence[str]) -> None:
        self._reader = NvmlReader(nvml, ids)
        self._health = DeviceHealth(config, model)
        self._periodic = Periodic("device watch", config.interval_s, self.read)

    @property
    def joules(self) -> Callable[[], float] | None:
        """A running sum of what the devices use; None where they do not count it."""
        return self._reader.joules if self._reader.counts_energy() else None

    async def read(self) -> None:
        """Read all devices."""
        self._health.take(await asyncio.to_thread(self._reader.read))

    def check(self) -> None:
        """Raise ``DeviceFailedError`` once a device has failed."""
        self._health.check()

    def observe(self, registry: Registry) -> None:
        """Write the last reading into the registry."""
        self._health.observe(registry)

    async def close(self) -> None:
        """End the reading."""
        await self._periodic.close()
        self._reader.close()
