"""Configuration of the router: API keys, queue limits, timeouts and request log."""

import re
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, ByteSize, Field, model_validator

from cluster.config.resources import ReplicasConfig, ResourcesConfig
from cluster.config.section import Section


def _check_digest(digest: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(
            'a digest has 64 hexadecimal digits; compute it with `printf %s "$KEY" | sha256sum`'
        )
    return digest


Sha256 = Annotated[str, AfterValidator(_check_digest)]


class HandoverConfig(Section):
    """Hand-over of running answers to another replica. Limits are per router."""

    enabled: bool = True
    """True if another replica continues an answer whose replica was lost, hangs or stops. If not,
    such an answer ends with an error, and replicas that stop finish their answers first."""
    max_per_request: int = Field(16, ge=1, le=1000)
    """Maximum number of hand-overs of one request."""
    max_answer_bytes: ByteSize = Field(ByteSize(4 * 1024**2), ge=64 * 1024)
    """Maximum size of what the router keeps of one answer, in bytes or with a unit: the request's
    body, and about 5 bytes per token. Larger ones are not handed over."""
    max_kept_bytes: ByteSize = Field(ByteSize(256 * 1024**2), ge=0)
    """Maximum size of what the router keeps of all answers, in bytes or with a unit. Beyond it,
    further answers are not handed over."""


class CircuitBreakerConfig(Section):
    """Circuit breakers, which take out slow and failing replicas. Each router has its own."""

    enabled: bool = True
    """True if a replica whose recent requests failed or were slow, and its peers' were not, gets no
    new requests until trials go well."""
    max_share: float = Field(0.5, ge=0, lt=1)
    """Maximum share of a pool's replicas (0 to 1) that are taken out, rounded down: one of two or
    three replicas by default, and never the only one."""
    slow_factor: float = Field(4.0, ge=1.5, le=100)
    """Multiple of the time that its peers take, and that it takes itself usually, from which a
    replica's answer counts as slow."""


class HedgeConfig(Section):
    """Second tries of classification requests that take unusually long."""

    enabled: bool = True
    """True if a request to a classifier without an answer after the 99th percentile of its pool's
    latencies is sent to another replica, too. The first answer wins, and the other is cancelled."""
    max_share: float = Field(0.02, gt=0, le=0.5)
    """Maximum share of a pool's requests, and of their tokens, (0 to 1) that are sent twice."""


class BatchesConfig(Section):
    """Files and batches: `/v1/files` and `/v1/batches`."""

    enabled: bool = True
    """True if clients may upload files and run batches."""
    directory: str | None = None
    """Directory of the files and of their SQLite database. Default: `batches-APPLICATION` in
    Tandem's home. Routers on several nodes need a directory that all of them share, or
    `database`."""
    database: str | None = Field(None, pattern=r"^postgres(ql)?://")
    """URL of a PostgreSQL database that keeps files and batches instead, such as
    `postgresql://batches@db.example.com/batches`. Put no password into it, but into a `passfile` on
    each node (`?passfile=/etc/tandem/pgpass`). Needs the extra `postgres`."""
    max_file_bytes: ByteSize = Field(ByteSize(200 * 1024**2), ge=1024)
    """Maximum size of an uploaded file, in bytes or with a unit; larger ones get status 413."""
    max_tenant_bytes: ByteSize = Field(ByteSize(10 * 1024**3), ge=1024)
    """Maximum size of all files of one tenant, in bytes or with a unit; further uploads get 413."""
    max_lines: int = Field(50_000, ge=1)
    """Maximum number of requests in one batch."""
    max_concurrent: int = Field(32, ge=1, le=1024)
    """Maximum number of lines of one batch that run at the same time."""
    share: float = Field(0.1, ge=0, le=1)
    """Lines that may run in one pool for each other request there (0 to 1), rounded down. Without
    other requests, `max_concurrent` may."""
    keep_days: int = Field(30, ge=1)
    """Retention of files and of finished batches, in days."""

    restart_fields: ClassVar[frozenset[str]] = frozenset({"enabled", "directory", "database"})


class TlsConfig(Section):
    """Certificate of the HTTP API. HAProxy then accepts HTTPS only, of TLS 1.2 or later."""

    certificate: str
    """PEM file with the certificate and its chain, at the same path on every node. HAProxy takes a
    renewed file within 10 s."""
    key: str
    """PEM file with the private key, at the same path on every node."""


class RouterConfig(Section):
    """Routers, which receive all HTTP requests. Limits are per router."""

    api_keys_sha256: tuple[Sha256, ...] = ()
    """SHA-256 digests (hex) of API keys accepted in addition to the key file's. Each is a tenant
    without limits."""
    operator_keys_sha256: tuple[Sha256, ...] = ()
    """SHA-256 digests (hex) of further accepted keys that may read every tenant's usage, metrics
    and dashboard."""
    keys_file: str | None = None
    """Key file written by `tandem keys`. Default: the keys that `tandem up --head` stored in Ray's
    GCS, or else `keys.yaml` in Tandem's home, if it exists. Without any key the router accepts
    every request on loopback, and none on other addresses."""
    keys_in_cluster: bool = False
    """True if routers take keys from Ray's GCS only, never from their own machine's `keys.yaml`.
    `tandem up --head` sets it unless `keys_file` is set."""
    open: bool = False
    """True if a router without keys accepts every request on any address, for example behind a
    proxy that authenticates."""
    tls: TlsConfig | None = None
    """HTTPS on `http_options.port`. Default: HTTP."""
    max_body_bytes: ByteSize = Field(ByteSize(32 * 1024**2), ge=1024)
    """Maximum size of a request body, in bytes or with a unit; larger ones get status 413."""
    max_header_bytes: ByteSize = Field(ByteSize(64 * 1024), ge=1024, le=512 * 1024)
    """Maximum size of a request's headers and path together, in bytes or with a unit; larger ones
    get status 431. HAProxy limits them to 15 KiB."""
    max_buffered_bytes: ByteSize = Field(ByteSize(512 * 1024**2), ge=1024)
    """Maximum size of the request bodies that one router buffers, in bytes or with a unit; beyond
    it requests are shed (429), and so are those of a tenant whose bodies exceed what remains free.
    Bodies of up to 64 KiB are always accepted. A body counts until its answer begins; then
    `handover` limits it. At least `max_body_bytes`."""
    max_connections_per_address: int = Field(1024, ge=1)
    """Maximum number of open connections from one address to the HAProxy of a node; further ones
    are closed. Raise it if clients share an address, such as that of another proxy."""
    header_timeout_s: int = Field(10, ge=1)
    """Maximum time for a client to send the header and the first 15 KiB of the body, in seconds;
    then 408. Applies with HAProxy."""
    min_upload_bytes_per_s: ByteSize = Field(ByteSize(1024), ge=0)
    """Minimum average rate at which a client sends a body over 64 KiB, in bytes per second or with
    a unit; then 408. A body may take `header_timeout_s` longer. 0: no minimum."""
    client_timeout_s: int = Field(60, ge=1)
    """Time after which HAProxy closes the connection of a client that stops sending its body or
    stops reading its answer, in seconds. Without HAProxy, the router ends such an answer; its
    connection stays open until the client reads the rest of the buffer or closes it."""
    max_queued: int = Field(1024, ge=0)
    """Maximum number of queued requests per pool; beyond it requests are shed (429)."""
    max_queued_tokens: float = Field(2_000_000, gt=0)
    """Maximum estimated work of the queued requests per pool, in tokens; beyond it requests are
    shed (429)."""
    max_sequences_per_request: int = Field(1024, ge=1, le=16384)
    """Maximum number of sequences of one request to a generator: its prompts or texts times `n`.
    Larger requests get status 400. Classifiers have `max_texts`."""
    queue_timeout_s: float = Field(60.0, gt=0)
    """Maximum time in the queue in seconds while the pool has replicas; then 429."""
    start_timeout_s: float = Field(300.0, gt=0)
    """Maximum time in the queue in seconds for the first replica of a pool with `min: 0`; then
    503. Other pools use `queue_timeout_s`."""
    max_answer_s: int = Field(3600, ge=1)
    """Duration of the longest answer, in seconds. Routers, replicas and HAProxy processes that are
    replaced finish the requests that they have for as long, and hold their resources meanwhile."""
    handover: HandoverConfig = HandoverConfig()
    """Hand-over of running answers to another replica."""
    circuit_breaker: CircuitBreakerConfig = CircuitBreakerConfig()
    """Circuit breakers of replicas."""
    hedge: HedgeConfig = HedgeConfig()
    """Second tries of classification requests."""
    batches: BatchesConfig = BatchesConfig()
    """Files and batches."""
    log_requests_per_s: float = Field(10.0, ge=0)
    """Maximum number of logged requests per second, and the same number again of failed ones."""
    log_prompts: bool = False
    """True if the log contains the first 2,000 characters of each logged request's body."""
    replicas: ReplicasConfig = ReplicasConfig(min=1, max=2, target_in_flight=256)
    """Number of routers and their autoscaling; `min` must be at least 1."""
    resources: ResourcesConfig = ResourcesConfig(cpus=0.2)
    """Resources of one router."""

    num_workers: ClassVar[int] = 1
    deployment: ClassVar[str] = "router"
    restart_fields: ClassVar[frozenset[str]] = frozenset({"resources"})

    @property
    def requires_keys(self) -> bool:
        """True if requests need an API key. Valid after loading, which fills in ``keys_file``."""
        keys = self.api_keys_sha256 or self.operator_keys_sha256 or self.keys_file
        return bool(keys) or (self.keys_in_cluster and not self.open)

    @model_validator(mode="after")
    def _check_min(self) -> Self:
        if self.replicas.min < 1:
            raise ValueError("replicas.min of the router must be at least 1: it queues requests")
        return self

    @model_validator(mode="after")
    def _check_buffer(self) -> Self:
        if self.max_buffered_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_buffered_bytes is {self.max_buffered_bytes}, but must be at least "
                f"max_body_bytes, {self.max_body_bytes}"
            )
        return self
