"""Reads NVIDIA's GPUs through NVML; the library (nvidia-ml-py) is an argument.

What a device does not support is None, and so absent from the metrics, never zero.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

logger = logging.getLogger("ray.serve.tandem")

T = TypeVar("T")

Nvml = Any
"""The module ``pynvml``, or what behaves like it."""

_THROTTLES = (  # that something is wrong; being idle or at the set limit is not
    "nvmlClocksEventReasonSwThermalSlowdown",
    "nvmlClocksThrottleReasonHwSlowdown",
    "nvmlClocksThrottleReasonHwThermalSlowdown",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
)
_MAX_EVENTS = 100
"""XID events of one reading; further ones come with the next."""


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """One device at one moment; None: it cannot say."""

    device: str
    """Its UUID."""
    lost: bool = False
    """It does not answer any more."""
    temperature_celsius: float | None = None
    power_watts: float | None = None
    memory_used_bytes: int | None = None
    energy_joules: float | None = None
    """Since its driver was loaded."""
    ecc_errors: int | None = None
    """Uncorrected ones since the driver was loaded."""
    throttled: bool | None = None
    """Heat or a power failure slows it down."""
    xids: tuple[int, ...] = ()
    """NVIDIA's error numbers since the last reading."""


def load_nvml() -> Nvml | None:
    """The library, initialized; None where it or the driver is missing."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        logger.info("no NVIDIA device can be read: %s", error)
        return None
    return pynvml


class NvmlReader:
    """Reads the devices that a replica was given.

    Args:
        nvml: The library, initialized.
        ids: Which devices: indices or UUIDs, as in CUDA_VISIBLE_DEVICES.

    Raises:
        nvml.NVMLError: there is no such device.
    """

    def __init__(self, nvml: Nvml, ids: Sequence[str]) -> None:
        self._nvml = nvml
        handles = [self._handle(device) for device in ids]
        self._devices = [(_text(nvml.nvmlDeviceGetUUID(handle)), handle) for handle in handles]
        self._events = self._watch_xids()

    def read(self) -> list[DeviceReading]:
        """All of them now; blocks for some milliseconds."""
        xids = self._take_xids()
        return [self._read(uuid, handle, xids.get(uuid, ())) for uuid, handle in self._devices]

    def joules(self) -> float:
        """What all devices used since their driver was loaded.

        Raises:
            nvml.NVMLError: one has no such counter, or is lost.
        """
        energy = self._nvml.nvmlDeviceGetTotalEnergyConsumption
        return sum(float(energy(handle)) for _, handle in self._devices) / 1e3

    def counts_energy(self) -> bool:
        """Whether ``joules`` works."""
        try:
            self.joules()
        except self._nvml.NVMLError:
            return False
        return bool(self._devices)

    def close(self) -> None:
        """Let go of the events."""
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
                temperature_celsius=self._ask(
                    lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
                ),
                power_watts=self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
                memory_used_bytes=self._ask(lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).used)),
                energy_joules=self._ask(
                    lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
                ),
                ecc_errors=self._ask(lambda: self._ecc_errors(handle)),
                throttled=self._ask(lambda: self._throttled(handle)),
                xids=xids,
            )
        except nvml.NVMLError as error:
            logger.error("GPU %s does not answer: %s", uuid, error)
            return DeviceReading(uuid, lost=True, xids=xids)

    def _ask(self, question: Callable[[], T]) -> T | None:
        """The answer; None where the device cannot say. Being lost is raised."""
        nvml = self._nvml
        try:
            return question()
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
        return any(reasons & getattr(self._nvml, name, 0) for name in _THROTTLES)

    def _watch_xids(self) -> Any:
        """The set of events in which critical XIDs come; None where there are none to be had."""
        nvml = self._nvml
        try:
            events = nvml.nvmlEventSetCreate()
        except nvml.NVMLError:
            return None
        for uuid, handle in self._devices:
            try:
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
            except nvml.NVMLError as error:  # virtual and MIG devices
                logger.info("GPU %s does not tell its XID errors: %s", uuid, error)
        return events

    def _take_xids(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        nvml = self._nvml
        for _ in range(_MAX_EVENTS if self._events is not None else 0):
            try:
                event = nvml.nvmlEventSetWait_v2(self._events, 0)
            except nvml.NVMLError:  # none is there: a timeout, as NVML has it
                break
            with suppress(nvml.NVMLError):
                uuid = _text(nvml.nvmlDeviceGetUUID(event.device))
                found[uuid] = (*found.get(uuid, ()), int(event.eventData))
        return found


def _text(given: str | bytes) -> str:
    return given.decode() if isinstance(given, bytes) else given
