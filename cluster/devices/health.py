"""Whether a replica's devices work, and what metrics say of them. Pure."""

from collections import Counter
from collections.abc import Sequence

from cluster.config.operations import DevicesConfig
from cluster.devices.nvml import DeviceReading
from cluster.errors import DeviceFailedError
from cluster.metrics import Registry, table


class DeviceHealth:
    """What is known of the devices of one replica of ``model``.

    A failure stays: a device that answers again after its errors is not trusted by this replica,
    and the one that follows looks at it anew.
    """

    def __init__(self, config: DevicesConfig, model: str) -> None:
        self.failure: str | None = None
        """Why the replica cannot go on; None: it can."""
        self._config = config
        self._model = model
        self._readings: Sequence[DeviceReading] = ()
        self._first_ecc: dict[str, int] = {}
        self._xids: Counter[tuple[str, int]] = Counter()

    def take(self, readings: Sequence[DeviceReading]) -> None:
        """Take in a reading of all devices."""
        self._readings = readings
        for reading in readings:
            self._xids.update((reading.device, xid) for xid in reading.xids)
            if reading.ecc_errors is not None:
                self._first_ecc.setdefault(reading.device, reading.ecc_errors)
            if self.failure is None and (why := self._why_failed(reading)) is not None:
                self.failure = f"GPU {reading.device}: {why}"

    def check(self) -> None:
        """Raise ``DeviceFailedError`` once a device has failed."""
        if self.failure is not None:
            raise DeviceFailedError(self.failure)

    def observe(self, registry: Registry) -> None:
        """Write what the devices said into the registry; nothing of what they did not."""
        for reading in self._readings:
            levels = {
                table.DEVICE_TEMPERATURE: reading.temperature_celsius,
                table.DEVICE_POWER: reading.power_watts,
                table.DEVICE_MEMORY: reading.memory_used_bytes,
                table.DEVICE_THROTTLED: reading.throttled,
            }
            for metric, level in levels.items():
                if level is not None:
                    registry.gauge(metric, self._model, reading.device).value = float(level)
            if reading.ecc_errors is not None:
                errors = registry.counter(table.DEVICE_ECC_ERRORS, self._model, reading.device)
                errors.value = float(reading.ecc_errors)
        for (device, xid), times in self._xids.items():
            count = registry.counter(table.DEVICE_XID_ERRORS, self._model, device, str(xid))
            count.value = float(times)

    def _why_failed(self, reading: DeviceReading) -> str | None:
        if reading.lost:
            return "it does not answer any more"
        if fatal := sorted(set(reading.xids) & set(self._config.fatal_xids)):
            return f"XID {', '.join(map(str, fatal))}"
        grown = (reading.ecc_errors or 0) - self._first_ecc.get(reading.device, 0)
        if reading.ecc_errors is not None and grown > 0:
            return f"{grown} uncorrected ECC errors"
        hottest = self._config.max_temperature_celsius
        if hottest is not None and (reading.temperature_celsius or 0.0) > hottest:
            return f"{reading.temperature_celsius:g} °C, above {hottest:g} °C"
        return None
