"""Root of the configuration: the ``args`` of Tandem's application in ``ray-config.yaml``."""

from collections.abc import Iterator, Sequence
from typing import Any, Self, get_args, get_origin

from pydantic import BaseModel, ByteSize, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from cluster.config.applications import APPLICATIONS, ApplicationsConfig
from cluster.config.choice import AutoConfig, check_choice
from cluster.config.guards import GuardConfig, check_guards
from cluster.config.operations import (
    AccountingConfig,
    DevicesConfig,
    IdempotencyConfig,
    LeaksConfig,
    OperationsConfig,
    TracingConfig,
)
from cluster.config.pools import ClassifierConfig, ClassifierTask, GeneratorConfig
from cluster.config.resources import BudgetConfig
from cluster.config.router import RouterConfig
from cluster.config.section import (
    Section,
    describe,
    first_error,
    list_allowed,
    reject_variables,
)
from cluster.errors import ConfigError

MIB = 1024**2

SERVE_LEVEL = (
    "http_options", "grpc_options", "logging_config", "proxy_location", "target_capacity",
    "controller_options",
)  # fmt: skip
"""Fields of the Serve config that are not Tandem's."""


class ClusterConfig(Section):
    """Local Ray cluster started by `tandem up`; ignored on other clusters."""

    num_cpus: int | None = Field(None, ge=1)
    """Logical CPUs of the cluster. Default: the machine's cores, at least 2."""
    ray_port: int = Field(6379, ge=1024, le=65535)
    """Port of the Ray head (GCS)."""
    dashboard_port: int = Field(8265, ge=1024, le=65535)
    """Port of Ray's dashboard."""
    prometheus_port: int = Field(9090, ge=1024, le=65535)
    """Port of Prometheus, which `tandem up --monitoring` starts."""
    grafana_port: int = Field(3000, ge=1024, le=65535)
    """Port of Grafana or its stand-in, which `tandem up --monitoring` starts."""
    object_store_memory_bytes: ByteSize = Field(ByteSize(256 * MIB), ge=80 * MIB)
    """Size of Ray's object store, in bytes or with a unit (`256MiB`)."""
    ready_timeout_s: float = Field(600.0, gt=0)
    """Maximum duration of a start until the cluster is healthy, in seconds. A first start builds
    the default models in this time."""


ServedPool = GeneratorConfig | ClassifierConfig | ApplicationsConfig
"""Configuration of what a router reaches over links."""


class TandemConfig(Section):
    """Configuration of one Tandem application."""

    generators: tuple[GeneratorConfig, ...] = ()
    """Pools of language models."""
    classifiers: tuple[ClassifierConfig, ...] = ()
    """Pools of BERT-like models."""
    router: RouterConfig = RouterConfig()
    """Routers, which receive all HTTP requests."""
    applications: ApplicationsConfig | None = None
    """Typed tasks and knowledge bases. Default: none; `{}` switches them on."""
    budget: BudgetConfig = BudgetConfig()
    """Limit on the resources of all pools and routers together."""
    cluster: ClusterConfig = ClusterConfig()
    """Local Ray cluster of `tandem up`."""
    tracing: TracingConfig | None = None
    """Export of request traces. Default: none."""
    accounting: AccountingConfig = AccountingConfig()
    """Energy and cost of requests."""
    leaks: LeaksConfig = LeaksConfig()
    """Leak detection."""
    devices: DevicesConfig = DevicesConfig()
    """GPU health checks."""
    idempotency: IdempotencyConfig = IdempotencyConfig()
    """Repetition of requests with an `Idempotency-Key`."""
    guards: tuple[GuardConfig, ...] = ()
    """Checks of prompts and answers of generators, in order of precedence."""
    auto: AutoConfig | None = None
    """Choice of the generator for requests with `model: auto`. Default: there is no such model."""

    @property
    def pools(self) -> tuple[GeneratorConfig | ClassifierConfig, ...]:
        return (*self.generators, *self.classifiers)

    @property
    def model_files(self) -> tuple[str, ...]:
        pools = [pool for _, pool in self.served_pools]
        paths = [path for pool in pools for path in pool.model_files]
        return tuple(dict.fromkeys(paths))

    @property
    def served_pools(self) -> tuple[tuple[str, ServedPool], ...]:
        """All pools by their name in the routers: the configured ones, candidates, applications."""
        tasks = self.applications
        applications = () if tasks is None else ((APPLICATIONS, tasks),)
        return (*self._model_pools, *applications)

    @property
    def _model_pools(self) -> tuple[tuple[str, GeneratorConfig | ClassifierConfig], ...]:
        new = [(pool.candidate_name, pool.candidate) for pool in self.pools]
        candidates = [(name, candidate) for name, candidate in new if candidate is not None]
        return (*((pool.name, pool) for pool in self.pools), *candidates)

    def with_default_models(self, applications: ApplicationsConfig) -> ApplicationsConfig:
        """Return the section with the first suitable models where it names none."""

        def first(task: ClassifierTask) -> str | None:
            return next((each.name for each in self.classifiers if task in each.tasks), None)

        generators = (generator.name for generator in self.generators)
        return applications.model_copy(
            update={
                "generator": applications.generator or next(generators, None),
                "classifier": applications.classifier or first("classify"),
                "encoder": applications.encoder or first("embed"),
            }
        )

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that requests may use as ``model``."""
        return tuple(name for pool in self.pools for name in pool.model_names)

    @property
    def max_answer_s(self) -> int:
        """Duration of the longest answer, in seconds."""
        return self.router.max_answer_s

    @property
    def operations(self) -> OperationsConfig:
        """Sections that every replica receives."""
        fields = OperationsConfig.model_fields
        return OperationsConfig.model_construct(**{name: getattr(self, name) for name in fields})

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = self.model_names
        if not names:
            raise ValueError("at least one generator or classifier is required")
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"names and aliases of generators, adapters and classifiers must be unique; "
                f"duplicates: {', '.join(duplicates)}"
            )
        if self.applications is not None and APPLICATIONS in names:
            raise ValueError(
                f"a model cannot be named {APPLICATIONS!r} beside the section `{APPLICATIONS}`"
            )
        for pools in (self.generators, self.classifiers):
            by_serve_name: dict[str, str] = {}
            for pool in pools:
                other = by_serve_name.setdefault(pool.serve_name, pool.name)
                if other != pool.name:
                    raise ValueError(
                        f"{other!r} and {pool.name!r} would both be {pool.serve_name!r} in Ray "
                        "Serve; rename one of them"
                    )
        return self

    @model_validator(mode="after")
    def _check_guards(self) -> Self:
        check_guards(self.guards, self.generators, self.classifiers)
        check_choice(self.auto, self.generators, self.classifiers)
        return self

    @model_validator(mode="after")
    def _check_default_models(self) -> Self:
        if (tasks := self.applications) is None:
            return self
        generators = [name for pool in self.generators for name in pool.model_names]

        def with_task(task: ClassifierTask) -> list[str]:
            pools = (pool for pool in self.classifiers if task in pool.tasks)
            return [name for pool in pools for name in pool.model_names]

        named = {
            "generator": (tasks.generator, generators),
            "classifier": (tasks.classifier, with_task("classify")),
            "encoder": (tasks.encoder, with_task("embed")),
            "knowledge.encoder": (tasks.knowledge.encoder, with_task("embed")),
            "knowledge.reranker": (tasks.knowledge.reranker, with_task("rerank")),
        }
        for field, (name, names) in named.items():
            if name is not None and name not in names:
                known = list_allowed(name, names) if names else "no model has the task for it"
                raise ValueError(f"applications.{field} is {name!r}; {known}")
        return self

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        parts: list[ServedPool | RouterConfig] = [self.router, *self.pools]
        if self.applications is not None:
            parts.append(self.applications)
        for kind in ("cpus", "gpus"):
            limit = getattr(self.budget, kind)
            minimum = sum(
                part.replicas.min * part.num_workers * getattr(part.resources, kind)
                for part in parts
            )
            if limit is not None and minimum > limit + 1e-9:
                raise ValueError(
                    f"budget.{kind} ({limit:g}) is less than the {minimum:g} that replicas.min of "
                    f"the router and all pools require"
                )
        return self


def parse(args: Any) -> TandemConfig:
    """Validate the ``args`` of Tandem's application.

    Raises:
        ConfigError: one line with the field, the value and what is allowed.
    """
    reject_variables(args)
    try:
        return TandemConfig.model_validate(args)
    except ValidationError as error:
        first = first_error(error)
        hint = ""
        if first["type"] == "extra_forbidden":
            *section, name = first["loc"]
            hint = f"; {_hint(section, str(name))}"
        raise ConfigError(f"{describe(error, 'args')}{hint}") from None


def _hint(loc: Sequence[int | str], name: str) -> str:
    """Return what to write instead of an unknown field at a pydantic error location."""
    if not loc and name in SERVE_LEVEL:
        return "it belongs at the top level of the file, next to `applications`"
    section: type[BaseModel] = TandemConfig
    for part in loc:
        if isinstance(part, str):
            section = next(_sections(section.model_fields[part]))
    for field, info in section.model_fields.items():
        # `sim` has names of vLLM's arguments.
        is_candidate = field != "sim" and get_origin(info.annotation) is not tuple
        if is_candidate and any(name in inner.model_fields for inner in _sections(info)):
            return f"it belongs to `{field}`: `{field}: {{{name}: …}}`"
    hint = "; vLLM's own arguments belong to `engine_args`" if section is GeneratorConfig else ""
    return list_allowed(name, sorted(section.model_fields)) + hint


def _sections(field: FieldInfo) -> Iterator[type[BaseModel]]:
    annotation: Any = field.annotation
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield kind
