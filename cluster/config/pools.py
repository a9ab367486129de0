"""Configuration of the pools: generators (language models) and classifiers (BERT-like models)."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, ByteSize, Field, model_validator

from cluster.config.engine_args import check_engine_args
from cluster.config.media import MediaConfig
from cluster.config.resources import ReplicasConfig, ResourcesConfig
from cluster.config.rollout import VERSION_PATTERN, RolloutConfig
from cluster.config.section import Section

MIB = 1024**2

PRIORITY_POLICY = "priority"
"""vLLM's ``scheduling_policy`` unless ``engine_args`` sets another; the router sends priorities."""

MAX_LORAS = 8
"""Default limit on the LoRA adapters that a replica keeps loaded; each takes engine memory."""

GPU_BATCH_TOKENS = 16_384
"""Default ``max_batch_tokens`` of classifiers on GPUs, which need many rows; not measured yet."""
CPU_STALL_TIMEOUT_S = 600.0
"""Default ``stall_timeout_s`` of generators without GPUs."""

AUTO = "auto"
"""Value of the parser fields: chosen from the model."""
NONE = "none"
"""Value of the parser fields: no parser."""

ParserName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
"""Name of one of vLLM's parsers, ``AUTO`` or ``NONE``."""

_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._:-]*"
_MODEL_NAME = re.compile(rf"{_SEGMENT}(/{_SEGMENT})*")


def _check_model_name(name: str) -> str:
    if not _MODEL_NAME.fullmatch(name):
        raise ValueError(
            "a model name has letters, digits, `.`, `_`, `-`, `:` and `/`, and starts with a "
            "letter or digit"
        )
    return name


ModelName = Annotated[str, Field(max_length=128), AfterValidator(_check_model_name)]
"""Name of a model in requests, such as `smollm2`, `org/model` or `llama3:8b`."""

ClassifierTask = Literal[
    "classify",
    "embed",
    "embed-sparse",
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
    "embed-sparse": "ForMaskedLM",
    "next-sentence": "ForNextSentencePrediction",
    "embed": None,
}
"""Suffix of the transformers architectures that support each task; None: every encoder."""

FallbackReason = Literal["overload", "failure", "guard"]
RoutingPolicy = Literal["least-load", "power-of-two", "prefix", "round-robin", "session"]


class GeneratorSlo(Section):
    """Service level objectives of a generator pool, measured in the router. null: no objective."""

    ttft_p90_s: float | None = Field(2.0, gt=0)
    """90th percentile of the time to first token, in seconds."""
    itl_p90_s: float | None = Field(0.2, gt=0)
    """90th percentile of the inter-token latency (the gap between two writes of a stream), in
    seconds."""


class ClassifierSlo(Section):
    """Service level objectives of a classifier pool, measured in the router. null: no objective."""

    latency_p95_s: float | None = Field(0.5, gt=0)
    """95th percentile of the time from the request to the end of its response, in seconds."""


class SimConfig(Section):
    """Simulated engine. Times are in seconds; 0 is instant."""

    startup_s: float = Field(0.0, ge=0)
    """Duration of a cold start, in seconds."""
    prefill_s_per_token: float = Field(0.0, ge=0)
    """Prefill time per prompt token whose KV block is not cached, in seconds."""
    decode_s_per_token: float = Field(0.0, ge=0)
    """Duration of a decode step with one running request, in seconds."""
    batch_slowdown: float = Field(0.0, ge=0)
    """Slowdown s of a decode step per further running request: t(n) = t(1) * (1 + s * (n - 1))."""
    max_num_seqs: int = Field(256, ge=1)
    """Maximum number of running requests; others wait in the engine."""
    num_kv_blocks: int = Field(8192, ge=1)
    """Size of the KV cache, in blocks."""
    block_size_tokens: int = Field(32, ge=1)
    """Size of a KV block, in tokens."""
    seed: int = 0
    """Seed of the generated tokens and of the failures."""
    adapter_load_s: float = Field(0.0, ge=0)
    """Time that loading one LoRA adapter adds to a step, in seconds."""
    fail_rate: float = Field(0.0, ge=0, le=1)
    """Share of requests (0 to 1) that the engine fails with HTTP status 500."""
    fail_startup: bool = False
    """True makes every start of the engine fail."""
    die_after_requests: int | None = Field(None, ge=1)
    """Number of accepted requests after which the engine dies, as a vLLM engine would. Default:
    never."""
    hang_after_requests: int | None = Field(None, ge=1)
    """Number of requests after which further ones are accepted but never answered. Default:
    never."""
    leak_bytes_per_request: ByteSize = Field(ByteSize(0), ge=0)
    """Memory that each request leaks, in bytes."""


class AudioConfig(Section):
    """Limits of a recording that a speech model transcribes."""

    max_file_bytes: ByteSize = Field(ByteSize(25 * MIB), ge=1024)
    """Size of the file, in bytes or with a unit. `router.max_body_bytes` limits the request."""
    max_duration_s: float = Field(600.0, gt=0, le=24 * 3600)
    """Duration, in seconds. A replica decodes it into 64 KB per second."""


class PoolConfig(Section):
    """Settings that generator and classifier pools share."""

    renamed_fields: ClassVar[Mapping[str, str]] = {"max_ongoing": "max_in_flight"}
    kind: ClassVar[str]
    """Kind of the pool, the first part of its deployment's name."""

    name: ModelName
    """Name of the pool, and the value of `model` in requests, such as `smollm2` or `org/model`."""
    aliases: tuple[ModelName, ...] = ()
    """Further names for `model` in requests. Answers, metrics and logs have the `name`."""
    model: str = Field(min_length=1)
    """Name of a default model (`tandem models list`), Hugging Face id, or local directory."""
    max_in_flight: int = Field(256, ge=1)
    """Maximum number of requests in flight at one replica; others wait in the router."""
    stall_timeout_s: float = Field(120.0, gt=0)
    """Time without an engine step, a batch or a tokenizer pass, in seconds, after which a replica
    with work counts as hung and is replaced. It must exceed the longest step; a long prompt takes
    several steps, of at most vLLM's `max_num_batched_tokens` each. In generators without GPUs the
    default is 600, because there a step with a full batch of prompt tokens can take minutes."""
    priority: int = 0
    """Precedence when the budget is exhausted: pools with a higher number get replicas first."""
    replicas: ReplicasConfig = ReplicasConfig()
    """Replica counts and autoscaling."""
    resources: ResourcesConfig = ResourcesConfig()
    """Resources of one replica; in generator pools, of each worker."""
    version: str | None = Field(None, pattern=VERSION_PATTERN)
    """Name of the model's version, which a rollout sets. A pool whose version changes otherwise is
    unavailable until its new replicas are ready."""
    rollout: RolloutConfig | None = None
    """Replacement of the model in progress; `tandem rollout MODEL` adds and removes it."""

    @property
    def num_workers(self) -> int:
        return 1

    @property
    def serve_name(self) -> str:
        """Name in Ray Serve, whose dashboard's URLs a slash would break."""
        name = self.name.replace("/", "--")
        return name if self.version is None else f"{name}@{self.version}"

    @property
    def candidate(self) -> Self | None:
        """The pool with the model of its rollout; None without one."""
        if self.rollout is None:
            return None
        changes = {"model": self.rollout.model, "version": self.rollout.version, "rollout": None}
        return self.model_copy(update=changes)

    @property
    def candidate_name(self) -> str:
        """Name of the candidate among a router's pools; no client can send it."""
        return f"{self.name}@{self.rollout.version if self.rollout else ''}"

    @property
    def deployment(self) -> str:
        """Name of the pool's deployment."""
        return f"{self.kind}-{self.serve_name}"

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that requests may use as ``model``."""
        return (self.name, *self.aliases)

    @model_validator(mode="after")
    def _check_scaling(self) -> Self:
        replicas = self.replicas
        # A replica that never reaches its target would never trigger an upscale.
        if replicas.max > replicas.min and replicas.target_in_flight > self.max_in_flight:
            raise ValueError(
                f"replicas.target_in_flight ({replicas.target_in_flight:g}) must be at most "
                f"max_in_flight ({self.max_in_flight})"
            )
        return self

    @model_validator(mode="after")
    def _check_version(self) -> Self:
        if self.rollout is not None and self.rollout.version == self.version:
            raise ValueError(f"rollout.version is {self.version!r}, the pool's present version")
        return self


def _has_gpus(data: Any) -> bool:
    """Return True if a pool that is not validated yet reserves GPUs."""
    resources = data.get("resources") if isinstance(data, dict) else None
    if isinstance(resources, ResourcesConfig):
        resources = resources.model_dump()
    return isinstance(resources, dict) and bool(resources.get("gpus"))


class GeneratorConfig(PoolConfig):
    """Pool of language-model replicas."""

    kind: ClassVar[str] = "generator"
    restart_fields: ClassVar[frozenset[str]] = frozenset(
        {
            *("model", "engine", "tensor_parallel_size", "pipeline_parallel_size", "dtype"),
            *("quantization", "max_model_len", "kv_cache_memory_bytes", "tool_call_parser"),
            *("reasoning_parser", "engine_args", "sim", "resources"),
        }
    )

    engine: Literal["vllm", "sim"] = "vllm"
    """Inference engine; `sim` simulates one without a model."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Number of workers that share each layer."""
    pipeline_parallel_size: int = Field(1, ge=1)
    """Number of pipeline stages into which the layers are divided."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of weights and activations. `auto` is the model's own type, but float32 on processors
    that only emulate bfloat16."""
    quantization: str | None = None
    """vLLM's quantization method. Default: the one in the model's configuration."""
    max_model_len: int | None = Field(None, ge=1)
    """Context length: prompt and completion tokens together. Default: the model's maximum."""
    kv_cache_memory_bytes: ByteSize | None = Field(None, ge=MIB)
    """KV cache of each worker, in bytes or with a unit (`512MiB`). Default: chosen by vLLM (1 GiB
    on CPUs)."""
    adapters: dict[ModelName, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    """LoRA adapters: the value of `model` in requests, and the adapter's directory or Hugging Face
    id."""
    tool_call_parser: ParserName = AUTO
    """vLLM's parser of tool calls. `auto` chooses by the chat template and the model's type; `none`
    turns tools off."""
    reasoning_parser: ParserName = AUTO
    """vLLM's parser that separates reasoning from the answer. `auto` chooses by the chat template
    and the model's type; `none` leaves the reasoning in the answer."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's `AsyncEngineArgs` or of its API server, by their Python names."""
    media: MediaConfig = MediaConfig()
    """Images, audio and video in requests."""
    fallbacks: tuple[ModelName, ...] = ()
    """Generators that are tried in this order if this one cannot answer."""
    fallback_on: tuple[FallbackReason, ...] = ("overload", "failure", "guard")
    """Reasons for a fallback: a queue that is full or too long (`overload`), an error of the server
    before the first byte (`failure`), a guard of this model that refuses the prompt (`guard`)."""
    audio: AudioConfig = AudioConfig()
    """Limits of recordings, for models such as Whisper."""
    sim: SimConfig = SimConfig()
    """Settings of `engine: sim`."""
    routing: RoutingPolicy = "prefix"
    """Policy that selects a replica: by cached prefix and load (`prefix`), load (`least-load`), the
    lower load of two random replicas (`power-of-two`), session (`session`), or in turn
    (`round-robin`)."""
    slo: GeneratorSlo = GeneratorSlo()
    """Objectives that autoscaling and the dashboard use."""

    @property
    def num_workers(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def needs_one_node(self) -> bool:
        """True if all workers of a replica must run on one node.

        The ranks of a layer exchange activations at every step, pipeline stages much less. Workers
        on CPUs are processes of the replica, because vLLM's Ray executor does not support CPUs.
        """
        return self.pipeline_parallel_size == 1 or not self.resources.gpus

    @property
    def model_names(self) -> tuple[str, ...]:
        return (*super().model_names, *self.adapters)

    def restart_value(self, field: str) -> Any:
        """Return the part of a field that only a restart can change; None if all changes live.

        Of ``adapters``, that is the engine's support for any.
        """
        if field == "adapters":
            return self.has_loras
        return super().restart_value(field)

    @property
    def model_files(self) -> tuple[str, ...]:
        """Model and adapters that the engine loads; empty for a simulated engine."""
        return (self.model, *self.adapters.values()) if self.engine == "vllm" else ()

    @property
    def has_loras(self) -> bool:
        """True if the engine starts with support for LoRA adapters, which takes memory."""
        return bool(self.adapters) or "max_loras" in self.engine_args

    @property
    def max_loras(self) -> int:
        """Adapters that a replica keeps loaded: ``engine_args.max_loras``, or all, at most 8."""
        return int(self.engine_args.get("max_loras", max(1, min(len(self.adapters), MAX_LORAS))))

    @model_validator(mode="before")
    @classmethod
    def _set_stall_timeout(cls, data: Any) -> Any:
        if not isinstance(data, dict) or _has_gpus(data):
            return data
        return {"stall_timeout_s": CPU_STALL_TIMEOUT_S, **data}

    @model_validator(mode="after")
    def _check_engine_args(self) -> Self:
        check_engine_args(self.engine_args)
        max_loras = self.engine_args.get("max_loras", 1)
        if not isinstance(max_loras, int) or isinstance(max_loras, bool) or max_loras < 1:
            raise ValueError(f"engine_args.max_loras is {max_loras!r}; it must be at least 1")
        return self

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        gpus, workers = self.resources.gpus, self.num_workers
        if workers > 1 and not (self.resources.cpus or gpus):
            raise ValueError(
                f"resources must reserve CPUs or GPUs for each of the {workers} workers"
            )
        if self.engine == "vllm" and workers > 1 and gpus not in (0, 1):
            raise ValueError(
                f"resources.gpus is {gpus:g}; it counts the GPUs of each of the {workers} workers "
                f"(tensor_parallel_size * pipeline_parallel_size), so write `gpus: 1`"
            )
        if self.engine == "vllm" and workers == 1 and gpus > 1:
            raise ValueError(
                f"resources.gpus is {gpus:g}, but one worker uses one GPU; write "
                f"`tensor_parallel_size: {gpus:.0f}` and `gpus: 1`, which is per worker"
            )
        return self


class ResultCacheConfig(Section):
    """LRU cache of results by text, in each classifier replica."""

    max_bytes: ByteSize = Field(ByteSize(0), ge=0)
    """Memory for cached texts and results, in bytes or with a unit. 0 turns the cache off."""
    isolate_tenants: bool = False
    """True if a tenant (header `x-tandem-tenant`) gets only results computed for itself."""


class ClassifierConfig(PoolConfig):
    """Pool of classifier replicas: BERT-like models that classify, embed or rank texts."""

    kind: ClassVar[str] = "classifier"
    restart_fields: ClassVar[frozenset[str]] = frozenset(
        {"model", "tasks", "dtype", "max_batch_tokens", "threads", "result_cache", "resources"}
    )

    tasks: tuple[ClassifierTask, ...] = Field(("classify", "embed"), min_length=1)
    """Tasks that the pool serves. All but `embed` need a model trained for the task."""
    dtype: Literal["auto", "bfloat16", "float16", "float32", "int8"] = "auto"
    """Type of weights and activations. `auto` is bfloat16 on processors with native bfloat16, else
    float32. At start-up, every type but float32 must agree with float32 on 99.5 % of the test
    texts. `int8` is for BERT on CPUs."""
    max_batch_tokens: int = Field(1024, ge=16)
    """Maximum number of tokens in a batch. On CPUs, larger batches add latency but no throughput.
    In pools with GPUs the default is 16,384."""
    max_queued_tokens: int = Field(1_000_000, ge=16)
    """Maximum number of tokens queued in one replica; beyond it requests are shed (429)."""
    max_texts: int = Field(10_000, ge=1)
    """Maximum number of texts in one request."""
    threads: int | None = Field(None, ge=1)
    """Compute threads of one replica. Default: one per core."""
    result_cache: ResultCacheConfig = ResultCacheConfig()
    """Cache of results."""
    routing: RoutingPolicy = "least-load"
    """Policy that selects a replica, as for generators."""
    slo: ClassifierSlo = ClassifierSlo()
    """Objectives that autoscaling and the dashboard use."""

    @property
    def model_files(self) -> tuple[str, ...]:
        """Model that the engine loads."""
        return (self.model,)

    @property
    def head(self) -> str | None:
        """Required suffix of the model's architecture; None if every encoder will do."""
        return next((TASK_HEADS[task] for task in self.tasks if TASK_HEADS[task]), None)

    @model_validator(mode="before")
    @classmethod
    def _set_max_batch_tokens(cls, data: Any) -> Any:
        return {"max_batch_tokens": GPU_BATCH_TOKENS, **data} if _has_gpus(data) else data

    @model_validator(mode="after")
    def _check_gpus(self) -> Self:
        if self.resources.gpus > 1:
            raise ValueError(
                f"resources.gpus is {self.resources.gpus:g}, but a classifier uses one GPU; write "
                f"`gpus: 1` and more replicas"
            )
        return self

    @model_validator(mode="after")
    def _check_head(self) -> Self:
        heads = {head: task for task in self.tasks if (head := TASK_HEADS[task])}
        if len(heads) > 1:
            raise ValueError(
                f"the tasks {' and '.join(heads.values())} need two different models; make a pool "
                "for each"
            )
        return self
