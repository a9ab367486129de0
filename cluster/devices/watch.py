"""Periodic readings of a replica's GPUs."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from cluster.config.operations import DevicesConfig
from cluster.devices.health import DeviceHealth
from cluster.devices.nvml import Nvml, NvmlReader
from cluster.periodic import Periodic


class DeviceWatch(DeviceHealth):
    """Devices of one replica, read periodically; call ``close`` at the end.

    Args:
        config: Settings; ``reconfigure`` replaces them.
        model: Model of the replica.
        nvml: See ``load_nvml``.
        ids: Devices, as for ``NvmlReader``.
        drain_node: Has this node drained; takes the fault of a device, returns False if it is worth
            another attempt. If the settings say so, it is called at each reading after a fault
            until it returns True.

    Raises:
        nvml.NVMLError: There is no such device.
    """

    def __init__(
        self,
        config: DevicesConfig,
        model: str,
        nvml: Nvml,
        ids: Sequence[str],
        drain_node: Callable[[str], Awaitable[bool]],
    ) -> None:
        super().__init__(config, model)
        self._reader = NvmlReader(nvml, ids)
        self._drain_node = drain_node
        self._drain_settled = False
        self._lock = asyncio.Lock()
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
        """Read the devices, after a reading in progress, and have the node drained if needed."""
        async with self._lock:
            self.add_readings(await asyncio.to_thread(self._reader.read))
            if self.fault is not None and self.config.drain_node and not self._drain_settled:
                self._drain_settled = await self._drain_node(self.fault)

    async def close(self) -> None:
        await self._periodic.close()
        self._reader.close()
