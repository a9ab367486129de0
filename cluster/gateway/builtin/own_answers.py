"""Types of the answers of the router's own paths, for the OpenAPI document."""

from typing import Any, Literal, NotRequired, TypedDict

from cluster.admission.budgets import BudgetState, Period
from cluster.batches import LineError
from cluster.batches.types import Status
from cluster.gateway.pools.pool import PoolKind


class ErrorInfo(TypedDict):
    """Description of an error."""

    message: str
    type: str
    param: str | None
    """Field of the request that is wrong."""
    code: int | str
    """Status of the answer, or `context_length_exceeded`."""


class ErrorBody(TypedDict):
    """Error in OpenAI's format."""

    error: ErrorInfo


class AnthropicErrorInfo(TypedDict):
    """Description of an error in Anthropic's format."""

    type: str
    message: str


class AnthropicErrorBody(TypedDict):
    """Error in Anthropic's format."""

    type: Literal["error"]
    error: AnthropicErrorInfo


class Health(TypedDict):
    """State of the router."""

    status: Literal["ok"]


class AdapterState(TypedDict):
    """State of one LoRA adapter."""

    replicas: int
    """Replicas that serve it."""
    errors: list[str]
    """Reasons why others could not load it."""


class PoolState(TypedDict):
    """State of one pool."""

    kind: PoolKind
    replicas: int
    ready: int
    """Replicas that take requests."""
    asleep: bool
    """True if the pool is scaled to zero and starts a replica for the next request."""
    queued: int
    in_flight: int
    running: int
    adapters: dict[str, AdapterState]
    """LoRA adapters by name."""


class Readiness(TypedDict):
    """State of all pools."""

    status: Literal["ready", "not ready"]
    pools: NotRequired[dict[str, PoolState]]
    """Absent if keys are configured, unless the request has an operator key."""


class Model(TypedDict):
    """A model that can be named in ``model``; engines add fields."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: NotRequired[int | None]


class Models(TypedDict):
    """Models that the key may use."""

    object: Literal["list"]
    data: list[Model]


class ModelCapabilities(Model):
    """A model with the fields that Infinity's clients read."""

    backend: str
    capabilities: list[str]
    stats: dict[str, Any]


class CapableModels(TypedDict):
    """Models that the key may use, with their capabilities."""

    object: Literal["list"]
    data: list[ModelCapabilities]


class UsageTotal(TypedDict):
    """Usage of several requests."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    joules: float | None
    cost: float | None


class UsageHour(UsageTotal):
    """Usage of one tenant and model in one hour."""

    hour: str
    tenant: str
    model: str
    joules_source: NotRequired[str]
    joules_missing: NotRequired[str]


class BudgetSpend(TypedDict):
    """Spend of a tenant, or of one of its keys, against its budget."""

    tenant: str
    key: str | None
    """Id of the key; null for the whole tenant."""
    period: Period
    spent: float
    soft_limit: float
    limit: float
    state: BudgetState
    renews_at: str


class UsageReport(TypedDict):
    """Usage by hour, tenant and model."""

    object: Literal["list"]
    currency: str | None
    data: list[UsageHour]
    total: UsageTotal
    budgets: list[BudgetSpend]


class DrainingReplica(TypedDict):
    """A replica on a node that drains."""

    id: str
    model: str


class Drain(TypedDict):
    """A replica or node that drains."""

    kind: Literal["replica", "node"]
    id: str
    model: NotRequired[str]
    in_flight: NotRequired[int]
    """Requests that the answering router has at the replica."""
    ip: NotRequired[str]
    replicas: NotRequired[list[DrainingReplica]]
    """Replicas on the node."""


class RolloutList(TypedDict):
    """Last rollout of each pool that had one."""

    object: Literal["list"]
    data: list[dict[str, Any]]


class FileObject(TypedDict):
    """An uploaded file, or an output of a batch."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]


class FileList(TypedDict):
    """Files of the tenant."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(TypedDict):
    """A file that was deleted."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class BatchErrors(TypedDict):
    """Reasons why a batch did not run."""

    object: Literal["list"]
    data: list[LineError]


class BatchCounts(TypedDict):
    """Lines of a batch."""

    total: int
    completed: int
    failed: int


class BatchCost(TypedDict):
    """Energy and cost of the answers so far."""

    joules: float | None
    cost: float | None
    currency: str | None


class BatchObject(TypedDict):
    """A batch; times are Unix times in seconds."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    usage: dict[str, Any]
    metadata: dict[str, str] | None
    tandem: BatchCost


class BatchList(TypedDict):
    """Batches of the tenant."""

    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
