"""Readings of NVIDIA GPUs through NVML.

Values that a device does not support are None, so they are absent from the metrics, not zero.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

logger = logging.getLogger("ray.serve.tandem")

T = TypeVar("T")

Nvml = Any
"""The module ``pynvml`` of nvidia-ml-py, or a fake."""

_THROTTLE_REASONS = (  # faults only; not idle clocks or the power limit
    "nvmlClocksEventReasonSwThermalSlowdown",
    "nvmlClocksThrottleReasonHwSlowdown",
    "nvmlClocksThrottleReasonHwThermalSlowdown",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
)
_MAX_EVENTS = 100
"""XID events per reading; the next reading gets further ones."""


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """State of one device; None for values it does not support."""

    device: str
    """UUID of the device."""
    lost: bool = False
    """True if the device stopped responding."""
    temperature_celsius: float | None = None
    power_watts: float | None = None
    memory_used_bytes: int | None = None
    ecc_errors: int | None = None
    """Uncorrected errors since the driver was loaded."""
    throttled: bool | None = None
    """True while heat or a power failure slows the device down."""
    xids: tuple[int, ...] = ()
    """XID error numbers since the last reading."""


def load_nvml() -> Nvml | None:
    """Return the initialized library, or None if it or the driver is missing."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        logger.info("NVML is not available, GPUs are not monitored: %s", error)
        return None
    return pynvml


class NvmlReader:
    """Reader of the devices assigned to a replica: indices or UUIDs as in CUDA_VISIBLE_DEVICES.

    Raises:
        nvml.NVMLError: There is no such device.
    """

    def __init__(self, nvml: Nvml, ids: Sequence[str]) -> None:
        self._nvml = nvml
        handles = [self._handle(device) for device in ids]
        self._devices = [(_text(nvml.nvmlDeviceGetUUID(handle)), handle) for handle in handles]
        self._events = self._watch_xids()

    def read(self) -> list[DeviceReading]:
        """Return the state of all devices; blocks for some milliseconds."""
        xids = self._take_xids()
        return [self._read(uuid, handle, xids.get(uuid, ())) for uuid, handle in self._devices]

    def joules(self) -> float:
        """Return the energy of all devices since their driver was loaded.

        Raises:
            nvml.NVMLError: A device has no energy counter, or is lost.
        """
        energy = self._nvml.nvmlDeviceGetTotalEnergyConsumption
        return sum(float(energy(handle)) for _, handle in self._devices) / 1e3

    def counts_energy(self) -> bool:
        try:
            self.joules()
        except self._nvml.NVMLError:
            return False
        return bool(self._devices)

    def close(self) -> None:
        if self._events is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlEventSetFree(self._events)
            self._events = None

    def _handle(self, device: str) -> Any:
        if device.isdigit():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(device))
        return self._nvml.nvmlDeviceGetHandleByUUID(device)

    def _read(self, uuid: str, handle: Any, xids: tuple[int, ...]) -> DeviceReading:
        nvml = self._nvml
        try:
            return DeviceReading(
                uuid,
                temperature_celsius=self._get(
                    lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
                ),
                power_watts=self._get(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
                memory_used_bytes=self._get(lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).used)),
                ecc_errors=self._get(lambda: self._ecc_errors(handle)),
                throttled=self._get(lambda: self._throttled(handle)),
                xids=xids,
            )
        except nvml.NVMLError as error:
            logger.error("GPU %s does not respond: %s", uuid, error)
            return DeviceReading(uuid, lost=True, xids=xids)

    def _get(self, query: Callable[[], T]) -> T | None:
        """Return None if the device does not support the query; raise if it is lost."""
        nvml = self._nvml
        try:
            return query()
        except nvml.NVMLError as error:
            if error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED):
                raise
            return None

    def _ecc_errors(self, handle: Any) -> int:
        nvml = self._nvml
        return int(
            nvml.nvmlDeviceGetTotalEccErrors(
                handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            )
        )

    def _throttled(self, handle: Any) -> bool:
        reasons = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return any(reasons & getattr(self._nvml, name, 0) for name in _THROTTLE_REASONS)

    def _watch_xids(self) -> Any:
        """Return an event set for critical XIDs, or None if the driver has no events."""
        nvml = self._nvml
        try:
            events = nvml.nvmlEventSetCreate()
        except nvml.NVMLError:
            return None
        for uuid, handle in self._devices:
            try:
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
            except nvml.NVMLError as error:  # virtual and MIG devices
                logger.info("GPU %s does not report XID errors: %s", uuid, error)
        return events

    def _take_xids(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        nvml = self._nvml
        for _ in range(_MAX_EVENTS if self._events is not None else 0):
            try:
                event = nvml.nvmlEventSetWait_v2(self._events, 0)
            except nvml.NVMLError:  # NVML reports a timeout if there is no event
                break
            with suppress(nvml.NVMLError):
                uuid = _text(nvml.nvmlDeviceGetUUID(event.device))
                found[uuid] = (*found.get(uuid, ()), int(event.eventData))
        return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
