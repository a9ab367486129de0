"""Configuration of tracing, accounting, leak detection, device health and kept answers.

Separate from the pools because every replica receives it.
"""

from typing import Annotated, ClassVar, Self

from pydantic import ByteSize, Field, model_validator

from cluster.config.section import Section

MIB = 1024**2


class TracingConfig(Section):
    """Export of request traces (OpenTelemetry)."""

    endpoint: str = Field(pattern=r"^https?://[^/\s]+(/\S*)?$")
    """Full URL of an OTLP/HTTP (protobuf) endpoint, e.g. `http://127.0.0.1:4318/v1/traces`."""
    headers: dict[str, str] = Field(default_factory=dict)
    """HTTP headers of each export, e.g. for authentication."""
    sample_ratio: float = Field(1.0, ge=0, le=1)
    """Share of requests (0 to 1) that are traced. Requests with a `traceparent` header follow its
    sampled flag instead."""
    max_queued_spans: int = Field(2048, ge=64, le=65536)
    """Maximum number of spans that wait for export in one process; further ones are dropped."""
    export_interval_s: float = Field(2.0, gt=0)
    """Interval between exports, in seconds."""


class AccountingConfig(Section):
    """Energy and cost of requests."""

    restart_fields: ClassVar[frozenset[str]] = frozenset({"energy", "watts_per_core", "interval_s"})

    energy: bool = True
    """True if the available energy counters (NVML, RAPL) are read."""
    watts_per_core: float | None = Field(None, gt=0)
    """Power of a busy core in watts, for an estimate on machines without energy counters. Default:
    no estimate."""
    currency: str = Field("EUR", min_length=1, max_length=8)
    """Currency of the prices."""
    per_cpu_hour: float = Field(0.0, ge=0)
    """Price of one reserved logical CPU per hour, in `currency`."""
    per_gpu_hour: float = Field(0.0, ge=0)
    """Price of one reserved logical GPU per hour, in `currency`."""
    interval_s: float = Field(2.0, ge=0.1)
    """Interval in seconds at which energy and cost are divided among the requests."""
    in_answers: bool = False
    """True adds `usage.tandem` to every non-streaming JSON response, not only on request."""
    keep_days: int = Field(400, ge=1)
    """Retention of `/v1/usage`, in days."""

    def price_per_hour(self, cpus: float, gpus: float) -> float:
        """Return the price of reserved resources per hour, in ``currency``."""
        return self.per_cpu_hour * cpus + self.per_gpu_hour * gpus


class LeaksConfig(Section):
    """Detection of memory leaks in replicas and routers."""

    sample_s: float = Field(15.0, gt=0)
    """Interval between memory samples, in seconds."""
    window_s: float = Field(1800.0, gt=0)
    """Length of the examined window in seconds; it must hold 10 to 1,000 samples."""
    settle_s: float = Field(300.0, ge=0)
    """Age of a process in seconds from which growth counts; before it, caches fill."""
    min_bytes_per_s: float = Field(16384.0, gt=0)
    """Growth in bytes per second from which a process leaks. 16 KiB/s are 1.3 GiB per day."""
    min_growth_bytes: ByteSize = Field(ByteSize(256 * MIB), ge=MIB)
    """Growth within the window, in bytes or with a unit, that is required as well."""
    replace: bool = False
    """True drains and replaces leaking replicas, one per pool at a time."""
    pause_s: float = Field(600.0, ge=10)
    """Minimum time between the end of a replacement's drain and the next one in a pool, in seconds.
    Must exceed a start."""

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if not 10 <= self.window_s / self.sample_s <= 1000:
            raise ValueError("window_s must be 10 to 1000 times sample_s")
        return self


class DevicesConfig(Section):
    """GPU health checks; the replica of a failed GPU is replaced."""

    interval_s: float = Field(5.0, gt=0)
    """Interval between checks, in seconds."""
    # NVIDIA's "XID Errors": double-bit ECC, failed row remapping, NVLink, fallen off the bus,
    # contained and uncontained ECC, GSP timeouts, unrecovered ECC. Others (13, 31, 43, 45, ...)
    # are faults of programs.
    fatal_xids: tuple[Annotated[int, Field(ge=1)], ...] = (48, 64, 74, 79, 94, 95, 119, 120, 140)
    """NVIDIA XID codes after which a GPU counts as failed. Default: the hardware errors."""
    max_temperature_celsius: float | None = Field(None, gt=0)
    """Temperature in degrees Celsius above which a GPU counts as failed. Default: no limit, as
    GPUs throttle themselves."""
    drain_node: bool = False
    """True has Ray drain the node of a GPU with a hardware fault (not of a hot one), so that no
    replica starts on it again. The head is not drained."""


class IdempotencyConfig(Section):
    """Repetition of requests with an `Idempotency-Key`. Limits are per replica."""

    keep_s: float = Field(60.0, ge=0, le=3600)
    """Time for which a replica keeps a finished answer, and goes on with a running one whose router
    was lost, in seconds. A request with the same key then gets this answer. 0: the header has no
    effect."""
    disconnect_grace_s: float = Field(10.0, ge=0, le=600)
    """Time for which a replica goes on with the answer to such a request after its HTTP client has
    disconnected, in seconds. At most `keep_s`."""
    max_answer_bytes: ByteSize = Field(ByteSize(4 * 1024**2), ge=64 * 1024)
    """Maximum size of one kept answer, in bytes or with a unit. A larger one is not kept."""
    max_kept_bytes: ByteSize = Field(ByteSize(128 * 1024**2), ge=0)
    """Maximum size of all kept answers, in bytes or with a unit. Beyond it, the oldest finished
    ones are dropped; if that does not suffice, further answers are not kept."""


class OperationsConfig(Section):
    """Operations settings of one replica."""

    restart_fields: ClassVar[frozenset[str]] = frozenset({"tracing"})

    tracing: TracingConfig | None
    accounting: AccountingConfig
    leaks: LeaksConfig
    devices: DevicesConfig
    idempotency: IdempotencyConfig
    max_answer_s: int
