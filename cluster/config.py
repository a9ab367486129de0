"""The configuration tree: what ``ray-config.yaml`` may say under its application's ``args``.

One frozen pydantic tree that forbids unknown fields; everything else reads it and nothing
changes it. Knows nothing of Ray, files or the command line (``cluster.config_file`` does).
"""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ByteSize, Field, ValidationError, model_validator

from cluster.config_operations import (
    AccountingConfig,
    DevicesConfig,
    LeaksConfig,
    OperationsConfig,
    TracingConfig,
)
from cluster.config_section import Section
from cluster.errors import ConfigError

MIB = 1024**2
PRIORITY_POLICY = "priority"
"""vLLM's ``scheduling_policy`` unless ``engine_args`` names another: the router says each class."""

MAX_LORAS = 8
"""Adapters that a replica has loaded at a time, where ``engine_args.max_loras`` does not say; each
takes memory of its engine."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
ClassifierTask = Literal[
    "classify",
    "embed",
    "fill-mask",
    "next-sentence",
    "rerank",
    "score",
    "token-classification",
]
TASK_HEADS: Mapping[ClassifierTask, str | None] = {
    "classify": "ForSequenceClassification",
    "score": "ForSequenceClassification",
    "rerank": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "fill-mask": "ForMaskedLM",
    "next-sentence": "ForNextSentencePrediction",
    "embed": None,
}
"""How the names of the architectures end that can do a task; None: any encoder can."""

RoutingPolicy = Literal["least-load", "power-of-two", "prefix", "round-robin", "session"]


class ReplicasConfig(Section):
    """How many replicas a pool may have, and the load at which one more is wanted."""

    min: int = Field(1, ge=0, le=4096)
    """0: none while there are no requests; the first one waits in the router for a start."""
    max: int = Field(1, ge=1, le=4096)
    target_ongoing: float = Field(32.0, gt=0)
    """Ongoing requests for each replica, until autoscaling has learned what one carries."""
    upscale_delay_s: float = Field(2.0, ge=0)
    """More must be wanted for so long before replicas are added; the first is added at once."""
    downscale_delay_s: float = Field(120.0, ge=0)
    """Fewer must be enough for so long before replicas are taken out."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max must be at least min ({self.min})")
        return self


class ResourcesConfig(Section):
    """What Ray reserves for one replica; for a generator, for each of its workers.

    ``cpus`` are Ray's logical shares: they place replicas and limit nothing.
    """

    cpus: float = Field(0.25, ge=0)
    gpus: float = Field(0.0, ge=0)
    custom: dict[str, float] = Field(default_factory=dict)


class GeneratorSlo(Section):
    """What clients of a generator are to see; None: no objective."""

    ttft_p90_s: float | None = Field(2.0, gt=0)
    """From a request to the first bytes of its stream."""
    itl_p90_s: float | None = Field(0.2, gt=0)
    """Between two writes of a stream."""


class ClassifierSlo(Section):
    """What clients of a classifier are to see; None: no objective."""

    latency_p95_s: float | None = Field(0.5, gt=0)
    """From a request to the end of its answer."""


class BudgetConfig(Section):
    """What the replicas of all pools and the routers may take together; None: no limit.

    Where it does not suffice, the router goes first, then pools by their ``priority``.
    """

    cpus: float | None = Field(None, ge=0)
    gpus: float | None = Field(None, ge=0)


class SimConfig(Section):
    """The simulated engine. Every time is in seconds and 0 is instant."""

    startup_s: float = Field(0.0, ge=0)
    prefill_s_per_token: float = Field(0.0, ge=0)
    """For each prompt token whose KV block is not cached."""
    decode_s_per_token: float = Field(0.0, ge=0)
    batch_slowdown: float = Field(0.0, ge=0)
    """Each further running request makes a step this much longer: t = t1 * (1 + s * (n - 1))."""
    max_num_seqs: int = Field(256, ge=1)
    num_kv_blocks: int = Field(8192, ge=1)
    block_size_tokens: int = Field(32, ge=1)
    seed: int = 0
    adapter_load_s: float = Field(0.0, ge=0)
    """What a step takes longer for each LoRA adapter that has to be loaded."""
    fail_rate: float = Field(0.0, ge=0, le=1)
    """Share of requests that end in a 500 of the engine."""
    fail_startup: bool = False
    die_after_requests: int | None = Field(None, ge=1)
    """The engine dies, as vLLM's does, when it has accepted this many requests."""
    hang_after_requests: int | None = Field(None, ge=1)
    """Requests after this many are accepted and never answered."""
    leak_bytes_per_request: ByteSize = Field(ByteSize(0), ge=0)
    """Memory that each request leaves behind."""


def _check_scaling(max_ongoing: int, replicas: ReplicasConfig) -> None:
    # A replica that is never given its target would never be joined by another one.
    if replicas.max > replicas.min and replicas.target_ongoing > max_ongoing:
        raise ValueError(
            f"replicas.target_ongoing ({replicas.target_ongoing:g}) must be at most "
            f"max_ongoing ({max_ongoing})"
        )


class GeneratorConfig(Section):
    """A pool of language-model replicas."""

    name: Name
    """What clients write in ``model``."""
    model: str = Field(min_length=1)
    """A default model's name (``tandem models list``), a Hugging Face id, or a directory."""
    engine: Literal["vllm", "sim"] = "vllm"
    tensor_parallel_size: int = Field(1, ge=1)
    pipeline_parallel_size: int = Field(1, ge=1)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: the model's own type, but float32 on processors that only emulate bfloat16."""
    quantization: str | None = None
    max_model_len: int | None = Field(None, ge=1)
    """Prompt and completion tokens together; None takes the model's own limit."""
    kv_cache_memory_bytes: ByteSize | None = Field(None, ge=MIB)
    """KV cache of each worker; None lets vLLM decide (on CPUs: 1 GiB)."""
    adapters: dict[Name, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    """LoRA adapters of the model: what clients write in ``model``, and a directory or a Hugging
    Face id of each."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Any further argument of vLLM's ``AsyncEngineArgs`` or of its server, by its Python name."""
    sim: SimConfig = SimConfig()
    max_ongoing: int = Field(256, ge=1)
    """Requests that one replica is given at a time; more wait in the router."""
    routing: RoutingPolicy = "prefix"
    """How a replica is chosen: by cache and load, by load alone, by session, or by neither."""
    slo: GeneratorSlo = GeneratorSlo()
    priority: int = 0
    """Where the budget does not suffice, the pool with the higher number goes first."""
    replicas: ReplicasConfig = ReplicasConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @property
    def num_workers(self) -> int:
        """Processes that compute for one replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def files(self) -> tuple[str, ...]:
        """The model and the adapters that its engine reads."""
        return (self.model, *self.adapters.values()) if self.engine == "vllm" else ()

    @property
    def max_loras(self) -> int:
        """Adapters that one replica has loaded at a time: ``engine_args.max_loras``, or all, up to
        ``MAX_LORAS``."""
        return int(self.engine_args.get("max_loras", max(1, min(len(self.adapters), MAX_LORAS))))

    @model_validator(mode="after")
    def _can_scale(self) -> Self:
        _check_scaling(self.max_ongoing, self.replicas)
        max_loras = self.engine_args.get("max_loras", 1)
        if not isinstance(max_loras, int) or isinstance(max_loras, bool) or max_loras < 1:
            raise ValueError(f"engine_args.max_loras: got {max_loras!r}; 1 or more is allowed")
        if self.num_workers > 1 and not (self.resources.cpus or self.resources.gpus):
            raise ValueError("resources must reserve something for each of several workers")
        return self


class ResultCacheConfig(Section):
    """What an encoder replica keeps of its results, by text; the least recently used one goes."""

    max_bytes: ByteSize = Field(ByteSize(0), ge=0)
    """The memory that texts and results may take; 0: nothing is kept."""
    isolate_tenants: bool = False
    """A tenant (header ``x-tandem-tenant``) finds only what was computed for it."""


class ClassifierConfig(Section):
    """A pool of encoder replicas."""

    name: Name
    """What clients write in ``model``."""
    model: str = Field(min_length=1)
    """A default model's name (``tandem models list``), a Hugging Face id, or a directory."""
    tasks: tuple[ClassifierTask, ...] = Field(("classify", "embed"), min_length=1)
    """What the pool answers; all but ``embed`` need the head that the model was trained with."""
    dtype: Literal["auto", "bfloat16", "float16", "float32", "int8"] = "auto"
    """auto: bfloat16 where the processor computes in it, else float32. All but float32 must agree
    with it on 99.5 % of the texts on which it is tried; int8 is for BERT on CPUs."""
    max_batch_tokens: int = Field(1024, ge=16)
    """Tokens computed at once. On CPUs more is not faster, and makes a single text wait longer."""
    max_queued_tokens: int = Field(1_000_000, ge=16)
    """Tokens that wait in one replica; beyond it a request is refused (429)."""
    max_texts: int = Field(10_000, ge=1)
    """Texts in one request."""
    threads: int | None = Field(None, ge=1)
    """Compute threads of one replica; None: one for each core."""
    result_cache: ResultCacheConfig = ResultCacheConfig()
    max_ongoing: int = Field(256, ge=1)
    routing: RoutingPolicy = "least-load"
    slo: ClassifierSlo = ClassifierSlo()
    priority: int = 0
    replicas: ReplicasConfig = ReplicasConfig()
    resources: ResourcesConfig = ResourcesConfig()

    num_workers: ClassVar[int] = 1

    @property
    def head(self) -> str | None:
        """How the name of the model's architecture must end; None: any encoder will do."""
        return next((TASK_HEADS[task] for task in self.tasks if TASK_HEADS[task]), None)

    @model_validator(mode="after")
    def _one_head(self) -> Self:
        heads = {head: task for task in self.tasks if (head := TASK_HEADS[task])}
        if len(heads) > 1:
            raise ValueError(
                f"the tasks {' and '.join(heads.values())} need two different models; make a pool "
                "for each"
            )
        return self

    @model_validator(mode="after")
    def _can_scale(self) -> Self:
        _check_scaling(self.max_ongoing, self.replicas)
        return self


class RouterConfig(Section):
    """The router: what it takes, and how long it waits."""

    api_keys_sha256: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = ()
    """SHA-256 (hex) of keys beside the key file's; each is a tenant of its own without limits."""
    operator_keys_sha256: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = ()
    """Further accepted keys, whose holders see every tenant's usage."""
    keys_file: str | None = None
    """What ``tandem keys`` writes; None: ``keys.yaml`` in Tandem's home, if it is there. With no
    key at all the router is open, which ``up`` allows on loopback alone."""
    max_body_bytes: ByteSize = Field(ByteSize(32 * MIB), ge=1024)
    max_queued: int = Field(1024, ge=0)
    """Requests that wait in one router for one pool; beyond it 429."""
    max_queued_tokens: float = Field(2_000_000, gt=0)
    """Their estimated work; beyond it 429."""
    queue_timeout_s: float = Field(60.0, gt=0)
    """The longest wait in the queue while replicas run; then 429."""
    start_timeout_s: float = Field(300.0, gt=0)
    """The longest wait for the first replica of a pool that may have none (``min: 0``); then 503.
    In other pools it is ``queue_timeout_s``."""
    log_requests_per_s: float = Field(10.0, ge=0)
    """Requests that one router logs in a second, and as many more of those that failed."""
    log_prompts: bool = False
    """Whether a request's line in the log holds the first 2000 characters of its body."""
    replicas: ReplicasConfig = ReplicasConfig(min=1, max=2, target_ongoing=256)
    resources: ResourcesConfig = ResourcesConfig(cpus=0.2)

    num_workers: ClassVar[int] = 1

    @property
    def asks_for_keys(self) -> bool:
        """Whether requests need an API key; where a loaded configuration names its key file."""
        return bool(self.api_keys_sha256 or self.operator_keys_sha256 or self.keys_file)

    @model_validator(mode="after")
    def _at_least_one(self) -> Self:
        if self.replicas.min < 1:
            raise ValueError("replicas.min of the router must be at least 1: it holds the requests")
        return self


class ClusterConfig(Section):
    """The local Ray cluster that ``tandem up`` starts; other clusters ignore it."""

    num_cpus: int | None = Field(None, ge=1)
    """Ray's logical CPUs; None: the machine's, and at least 2."""
    ray_port: int = Field(6379, ge=1024, le=65535)
    dashboard_port: int = Field(8265, ge=1024, le=65535)
    prometheus_port: int = Field(9090, ge=1024, le=65535)
    """Used by ``tandem up --monitoring`` alone."""
    object_store_memory_bytes: ByteSize = Field(ByteSize(256 * MIB), ge=80 * MIB)
    ready_timeout_s: float = Field(600.0, gt=0)


class TandemConfig(Section):
    """Everything that one Tandem application is made of."""

    generators: tuple[GeneratorConfig, ...] = ()
    classifiers: tuple[ClassifierConfig, ...] = ()
    router: RouterConfig = RouterConfig()
    budget: BudgetConfig = BudgetConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracing: TracingConfig | None = None
    accounting: AccountingConfig = AccountingConfig()
    leaks: LeaksConfig = LeaksConfig()
    devices: DevicesConfig = DevicesConfig()

    @property
    def files(self) -> tuple[str, ...]:
        """The models and adapters that engines read, each once."""
        read = [path for pool in self.generators for path in pool.files]
        return tuple(dict.fromkeys([*read, *(pool.model for pool in self.classifiers)]))

    @property
    def operations(self) -> OperationsConfig:
        """The part of it that every replica gets."""
        return OperationsConfig(
            tracing=self.tracing,
            accounting=self.accounting,
            leaks=self.leaks,
            devices=self.devices,
        )

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [pool.name for pool in self.generators]
        names += [pool.name for pool in self.classifiers]
        names += [adapter for pool in self.generators for adapter in pool.adapters]
        if not names:
            raise ValueError("at least one generator or classifier is needed")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"each name may stand once among generators, adapters and classifiers: {twice}"
            )
        return self

    @model_validator(mode="after")
    def _floors_fit(self) -> Self:
        parts: list[GeneratorConfig | ClassifierConfig | RouterConfig]
        parts = [self.router, *self.generators, *self.classifiers]
        for kind in ("cpus", "gpus"):
            limit = getattr(self.budget, kind)
            floors = [
                part.replicas.min * part.num_workers * getattr(part.resources, kind)
                for part in parts
            ]
            if limit is not None and sum(floors) > limit + 1e-9:
                raise ValueError(
                    f"budget.{kind} ({limit:g}) must hold the replicas.min of every pool and the "
                    f"router ({sum(floors):g})"
                )
        return self


def parse(args: Any) -> TandemConfig:
    """Check ``args`` and return the tree.

    Raises:
        ConfigError: one line with the field, the value and what is allowed.
    """
    try:
        return TandemConfig.model_validate(args)
    except ValidationError as error:
        raise ConfigError(_one_line(error, args)) from None


def _one_line(error: ValidationError, args: Any) -> str:
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"]) or "args"
    value = _shorten(first["input"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{path}: no such field (value {value}); allowed: {', '.join(known)}{hint}"
    if first["type"] == "missing":
        return f"{path}: missing; this field is required"
    allowed = first["msg"].removeprefix("Value error, ")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{path}: got {value}; {allowed[0].lower()}{allowed[1:]}{more}"


def _shorten(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _fields_at(loc: tuple[int | str, ...]) -> list[str]:
    """The field names of the section that a pydantic error location points into."""
    section: type[BaseModel] = TandemConfig
    for part in loc:
        if isinstance(part, int):
            continue
        annotation: Any = section.model_fields[part].annotation
        inner = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type)]
        section = next(a for a in inner if issubclass(a, BaseModel))
    return sorted(section.model_fields)
