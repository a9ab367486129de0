"""Readings through a fake NVML, and the failures that stop a replica."""

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config.operations import DevicesConfig
from cluster.devices.health import DeviceHealth
from cluster.devices.nvml import DeviceReading, NvmlReader
from cluster.errors import DeviceFailedError
from cluster.metrics import Registry, exposition


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class Gpu:
    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self.answers: dict[str, Any] = {
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetPowerUsage": 250_500,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=3 * 2**30),
            "nvmlDeviceGetTotalEnergyConsumption": 5_000,
            "nvmlDeviceGetTotalEccErrors": 2,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0,
        }


class Nvml:
    """The functions of nvidia-ml-py that are used, over fake GPUs."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_TIMEOUT = 10
    NVML_ERROR_GPU_IS_LOST = 15
    NVML_ERROR_RESET_REQUIRED = 16
    nvmlClocksThrottleReasonHwThermalSlowdown = 0x40  # noqa: N815
    nvmlEventTypeXidCriticalError = 8  # noqa: N815

    def __init__(self, *gpus: Gpu) -> None:
        self.gpus = list(gpus)
        self.events: list[tuple[Gpu, int]] = []
        self.freed = False

    def __getattr__(self, name: str) -> Any:
        def ask(gpu: Gpu, *_args: int) -> Any:
            answer = gpu.answers[name]
            if isinstance(answer, Exception):
                raise answer
            return answer

        if not name.startswith("nvmlDeviceGet"):
            raise AttributeError(name)
        return ask

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:  # noqa: N802
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:  # noqa: N802
        return next(gpu for gpu in self.gpus if gpu.uuid == uuid)

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:  # noqa: N802
        return gpu.uuid

    def nvmlEventSetCreate(self) -> str:  # noqa: N802
        return "events"

    def nvmlDeviceRegisterEvents(self, gpu: Gpu, kind: int, events: str) -> None:  # noqa: N802
        assert (kind, events) == (self.nvmlEventTypeXidCriticalError, "events")

    def nvmlEventSetWait_v2(self, _events: str, _timeout_ms: int) -> Any:  # noqa: N802
        if not self.events:
            raise NVMLError(self.NVML_ERROR_TIMEOUT)
        gpu, xid = self.events.pop(0)
        return SimpleNamespace(device=gpu, eventData=xid)

    def nvmlEventSetFree(self, _events: str) -> None:  # noqa: N802
        self.freed = True


def test_readings_are_in_base_units() -> None:
    nvml = Nvml(Gpu("GPU-a"), Gpu("GPU-b"))
    reader = NvmlReader(nvml, ["1"])
    nvml.events = [(nvml.gpus[1], 13), (nvml.gpus[1], 79)]
    (reading,) = reader.read()
    assert reading == DeviceReading("GPU-b", False, 61.0, 250.5, 3 * 2**30, 2, False, xids=(13, 79))
    assert reader.read()[0].xids == ()
    assert reader.counts_energy()
    assert NvmlReader(nvml, ["GPU-a", "1"]).joules() == 10.0
    reader.close()
    assert nvml.freed


def test_throttling_is_caused_by_heat_and_not_by_the_power_limit() -> None:
    gpu = Gpu("GPU-a")
    reader = NvmlReader(Nvml(gpu), ["0"])
    for reasons, throttled in ((0x40, True), (0x41, True), (0x4, False), (0x1, False)):
        gpu.answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = reasons
        assert reader.read()[0].throttled is throttled


def test_unsupported_values_are_absent() -> None:
    gpu = Gpu("GPU-a")
    for name in gpu.answers:
        gpu.answers[name] = NVMLError(Nvml.NVML_ERROR_NOT_SUPPORTED)
    reader = NvmlReader(Nvml(gpu), ["0"])
    (reading,) = reader.read()
    assert reading == DeviceReading("GPU-a")
    assert not reader.counts_energy()
    health = DeviceHealth(DevicesConfig(), "m")
    health.add_readings([reading])
    health.check()
    registry = Registry()
    health.observe(registry)
    assert b"tandem_device" not in exposition(registry)


def test_readings_become_metrics() -> None:
    health = DeviceHealth(DevicesConfig(), "m")
    registry = Registry()
    for _ in range(2):
        health.add_readings([DeviceReading("GPU-a", False, 61.0, 250.5, 100, 2, True, xids=(13,))])
    health.observe(registry)
    text = exposition(registry).decode()
    for line in (
        'tandem_device_temperature_celsius{device="GPU-a",model="m"} 61.0',
        'tandem_device_power_watts{device="GPU-a",model="m"} 250.5',
        'tandem_device_memory_used_bytes{device="GPU-a",model="m"} 100.0',
        'tandem_device_throttled{device="GPU-a",model="m"} 1.0',
        'tandem_device_ecc_errors_total{device="GPU-a",model="m"} 2.0',
        'tandem_device_xid_errors_total{device="GPU-a",model="m",xid="13"} 2.0',
    ):
        assert line in text
    health.check()


@pytest.mark.parametrize(
    ("bad", "reason", "is_fault"),
    [
        (DeviceReading("GPU-a", xids=(13, 79)), "XID 79", True),
        (DeviceReading("GPU-a", ecc_errors=5), "3 uncorrected ECC errors", True),
        (DeviceReading("GPU-a", lost=True), "stopped responding", True),
        (DeviceReading("GPU-a", temperature_celsius=96.0), "temperature 96 °C exceeds 95", False),
    ],
)
def test_a_failed_device_stops_its_replica_for_good(
    bad: DeviceReading, reason: str, is_fault: bool
) -> None:
    health = DeviceHealth(DevicesConfig(max_temperature_celsius=95.0), "m")
    good = DeviceReading("GPU-a", temperature_celsius=90.0, ecc_errors=2, xids=(31, 43))
    health.add_readings([good])
    health.check()
    health.add_readings([bad])
    health.add_readings([good])
    with pytest.raises(DeviceFailedError, match=reason):
        health.check()
    assert health.fault == (health.failure if is_fault else None)


def test_a_device_that_falls_off_the_bus_is_lost() -> None:
    gpu = Gpu("GPU-a")
    reader = NvmlReader(Nvml(gpu), ["0"])
    gpu.answers["nvmlDeviceGetPowerUsage"] = NVMLError(Nvml.NVML_ERROR_GPU_IS_LOST)
    assert reader.read() == [DeviceReading("GPU-a", lost=True)]
