"""Health and metrics of a replica's devices. Pure."""

from collections import Counter
from collections.abc import Sequence

from cluster.config.operations import DevicesConfig
from cluster.devices.nvml import DeviceReading
from cluster.errors import DeviceFailedError
from cluster.metrics import Registry, table


class DeviceHealth:
    """State of the devices of one replica.

    A failure is permanent: the replica does not trust a device again that recovered from errors.
    Its successor starts from scratch.
    """

    def __init__(self, config: DevicesConfig, model: str) -> None:
        self.failure: str | None = None
        """Reason why the replica must stop, or None."""
        self.fault: str | None = None
        """First fault of a device that its successor would meet again, or None; heat is none."""
        self.config = config
        """Limits; may be replaced."""
        self._model = model
        self._readings: Sequence[DeviceReading] = ()
        self._first_ecc: dict[str, int] = {}
        self._xids: Counter[tuple[str, int]] = Counter()

    def add_readings(self, readings: Sequence[DeviceReading]) -> None:
        self._readings = readings
        for reading in readings:
            self._xids.update((reading.device, xid) for xid in reading.xids)
            if reading.ecc_errors is not None:
                self._first_ecc.setdefault(reading.device, reading.ecc_errors)
            if (reason := self._fault_of(reading)) is not None:
                self.fault = self.fault or f"GPU {reading.device}: {reason}"
                self.failure = self.failure or self.fault
            elif (reason := self._heat_of(reading)) is not None:
                self.failure = self.failure or f"GPU {reading.device}: {reason}"

    def check(self) -> None:
        """Raise ``DeviceFailedError`` if a device has failed."""
        if self.failure is not None:
            raise DeviceFailedError(self.failure)

    def observe(self, registry: Registry) -> None:
        """Write the last readings to the registry; values that a device lacks stay absent."""
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
        for (device, xid), occurrences in self._xids.items():
            count = registry.counter(table.DEVICE_XID_ERRORS, self._model, device, str(xid))
            count.value = float(occurrences)

    def _fault_of(self, reading: DeviceReading) -> str | None:
        if reading.lost:
            return "it stopped responding"
        if fatal := sorted(set(reading.xids) & set(self.config.fatal_xids)):
            return f"XID {', '.join(map(str, fatal))}"
        new_errors = (reading.ecc_errors or 0) - self._first_ecc.get(reading.device, 0)
        if reading.ecc_errors is not None and new_errors > 0:
            return f"{new_errors} uncorrected ECC errors"
        return None

    def _heat_of(self, reading: DeviceReading) -> str | None:
        limit = self.config.max_temperature_celsius
        if limit is not None and (reading.temperature_celsius or 0.0) > limit:
            return f"temperature {reading.temperature_celsius:g} °C exceeds {limit:g} °C"
        return None
