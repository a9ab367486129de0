"""The configuration of what watches a deployment: traces, cost and energy, memory, devices.

Apart from ``cluster.config`` because every replica gets it, and a replica is replaced whenever
what it was given changes: it must hold nothing of other pools.
"""

from typing import Annotated, Self

from pydantic import ByteSize, Field, model_validator

from cluster.config_section import Section

MIB = 1024**2


class TracingConfig(Section):
    """Where the spans of requests are sent, and of how many."""

    endpoint: str = Field(pattern=r"^https?://[^/\s]+(/\S*)?$")
    """OTLP over HTTP with protobuf, the whole URL: ``http://127.0.0.1:4318/v1/traces``."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Sent with each export, for collectors that ask for a key."""
    sample_ratio: float = Field(1.0, ge=0, le=1)
    """Share of the requests traced that bring no ``traceparent``; else its flag decides."""
    max_queued_spans: int = Field(2048, ge=64, le=65536)
    """Spans of one process that wait to be sent; beyond it they are dropped."""
    export_interval_s: float = Field(2.0, gt=0)


class AccountingConfig(Section):
    """What a deployment's work costs, in joules and in money."""

    energy: bool = True
    """Read the energy counters that there are (NVML, RAPL)."""
    watts_per_core: float | None = Field(None, gt=0)
    """Where no counter can be read: the power of a busy core, for an estimate named as such."""
    currency: str = Field("EUR", min_length=1, max_length=8)
    per_cpu_hour: float = Field(0.0, ge=0)
    """Price of one reserved CPU share for an hour, in ``currency``."""
    per_gpu_hour: float = Field(0.0, ge=0)
    interval_s: float = Field(2.0, ge=0.1)
    """How often what was measured is divided among the requests."""
    in_answers: bool = False
    """Put ``usage.tandem`` into every whole JSON answer, not only where a request asks for it."""
    keep_days: int = Field(400, ge=1)
    """How long ``/v1/usage`` remembers."""

    def price_per_hour(self, cpus: float, gpus: float) -> float:
        """Of so many reserved shares, in ``currency``."""
        return self.per_cpu_hour * cpus + self.per_gpu_hour * gpus


class LeaksConfig(Section):
    """When growing memory is taken for a leak, and what is done then."""

    sample_s: float = Field(15.0, gt=0)
    window_s: float = Field(1800.0, gt=0)
    settle_s: float = Field(300.0, ge=0)
    """Caches fill at first; growth before this age of a process is not looked at."""
    min_bytes_per_s: float = Field(16384.0, gt=0)
    """Slower growth is no leak: 16 KiB/s are 1.3 GiB a day."""
    min_growth_bytes: ByteSize = Field(ByteSize(256 * MIB), ge=MIB)
    """What a window must have gained besides."""
    replace: bool = False
    """Drain and replace a replica that leaks, one of its pool at a time."""
    pause_s: float = Field(600.0, ge=10)
    """The least time between two replacements in one pool: a drain and a start must fit in."""

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if not 10 <= self.window_s / self.sample_s <= 1000:
            raise ValueError("window_s must hold 10 to 1000 samples of sample_s")
        return self


class DevicesConfig(Section):
    """When a GPU counts as failed, so that its replica is replaced."""

    interval_s: float = Field(5.0, gt=0)
    fatal_xids: tuple[Annotated[int, Field(ge=1)], ...] = (48, 64, 74, 79, 94, 95, 119, 120, 140)
    """NVIDIA's "XID Errors": double-bit ECC, failed row remapping, NVLink, fallen off the bus,
    contained and uncontained ECC, GSP timeouts, unrecovered ECC. Others (13, 31, 43, 45, ...) are
    faults of programs."""
    max_temperature_celsius: float | None = Field(None, gt=0)
    """Above it a device counts as failed; None: the device throttles itself, and that is shown."""


class OperationsConfig(Section):
    """All of it, as a replica gets it."""

    tracing: TracingConfig | None
    accounting: AccountingConfig
    leaks: LeaksConfig
    devices: DevicesConfig
