"""The router's own paths and the types of their answers, for the OpenAPI document."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

from cluster.admission.budgets import BudgetState, Period
from cluster.batches import LineError
from cluster.batches.types import Status
from cluster.gateway.admission.budgets import SPEND_PATH
from cluster.gateway.batches.routes import BatchRequest
from cluster.gateway.builtin.drain import DRAIN_PATH
from cluster.gateway.builtin.guards import GUARDS_PATH, GuardTest, GuardTestRequest
from cluster.gateway.builtin.operations import (
    CreatedKey,
    KeyList,
    LogReport,
    NewKeyRequest,
    RevokedKey,
)
from cluster.gateway.pools.pool import PoolKind
from cluster.gateway.reporting.dashboard import DATA_PATH, REPORT_PATH
from cluster.gateway.reporting.usage_report import COPIES_PATH, ROWS_PATH
from cluster.operator_api import KEY_PATH, KEYS_PATH, LOGS_PATH

MODEL_PATH = "/v1/models/{model}"
ROLLOUTS_PATH = "/v1/rollouts"
ROLLOUT_PATH = "/v1/rollouts/{model}"
HTML = "text/html"


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


class OwnPath(NamedTuple):
    """Description of one of the router's paths."""

    summary: str
    reply: Any = dict[str, Any]
    """Type of the answer."""
    media_type: str = "application/json"
    text_media_type: str | None = None
    """Another media type of the answer, if any."""
    statuses: tuple[int, ...] = ()
    """Errors in addition to those of all paths."""
    parameters: tuple[dict[str, Any], ...] = ()
    is_public: bool = False
    has_503: bool = False
    """True if the answer may have the status 503."""
    method: Literal["get", "post", "delete"] = "get"
    body: Any = None
    """Type of the request's JSON body; None without one."""
    form: Mapping[str, Any] | None = None
    """Schema of the request's form, if it has one."""
    tag: str = "Router"
    others: tuple["OwnPath", ...] = ()
    """The same path with other methods."""


def _query(name: str, description: str, **schema: Any) -> dict[str, Any]:
    kind = {"type": "string", **schema}
    return {"name": name, "in": "query", "description": description, "schema": kind}


def _in_path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


_LISTING = (
    _query("limit", "Items, at most 100 of which are returned.", type="integer", minimum=1),
    _query("after", "Id of the last item of the previous page."),
    _query("order", "Order by time of creation.", enum=["asc", "desc"]),
)
_FILE, _BATCH = _in_path("file_id"), _in_path("batch_id")
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
    },
}
_own = partial(OwnPath, tag="OpenAI")
BATCH_PATHS: Mapping[str, OwnPath] = {
    "/v1/files": _own(
        "List the files.",
        FileList,
        statuses=(501,),
        parameters=(_query("purpose", "Default: all."), *_LISTING),
        others=(
            _own(
                "Upload a file.",
                FileObject,
                statuses=(408, 413, 429, 501),
                method="post",
                form=_FORM,
            ),
        ),
    ),
    "/v1/files/{file_id}": _own(
        "Return a file's description.",
        FileObject,
        statuses=(404, 501),
        parameters=(_FILE,),
        others=(
            _own(
                "Delete a file.",
                DeletedFile,
                statuses=(404, 501),
                parameters=(_FILE,),
                method="delete",
            ),
        ),
    ),
    "/v1/files/{file_id}/content": _own(
        "Return a file's content.",
        bytes,
        "application/octet-stream",
        statuses=(404, 501),
        parameters=(_FILE,),
    ),
    "/v1/batches": _own(
        "List the batches.",
        BatchList,
        statuses=(501,),
        parameters=_LISTING,
        others=(
            _own(
                "Create a batch.",
                BatchObject,
                statuses=(404, 413, 429, 501),
                method="post",
                body=BatchRequest,
            ),
        ),
    ),
    "/v1/batches/{batch_id}": _own(
        "Return a batch.", BatchObject, statuses=(404, 501), parameters=(_BATCH,)
    ),
    "/v1/batches/{batch_id}/cancel": _own(
        "Cancel a batch; its results so far stay.",
        BatchObject,
        statuses=(404, 501),
        parameters=(_BATCH,),
        method="post",
    ),
}
"""Paths of files and batches, which exist unless ``router.batches.enabled`` is false."""

_SINCE = _query("since", "Unix time in seconds; only later data is returned.", pattern="^[0-9]+$")
_TIME = "Unix seconds or an ISO 8601 time."
_ROWS = (
    _query("start", "Unix time in seconds."),
    _query("end", "Unix time in seconds."),
    _query("tenant", "Default: all tenants."),
)

OWN_PATHS: Mapping[str, OwnPath] = {
    "/health": OwnPath("Return 200 while the router runs.", Health, is_public=True),
    "/ready": OwnPath(
        "Return the state of every pool; 503 if a pool has no ready replica.",
        Readiness,
        is_public=True,
        has_503=True,
    ),
    "/version": OwnPath("Return the components' versions.", dict[str, str], is_public=True),
    "/v1/models": OwnPath("List the models.", Models, tag="OpenAI"),
    "/models": OwnPath("List the models with their capabilities (Infinity).", CapableModels),
    MODEL_PATH: OwnPath(
        "Return one model.",
        Model,
        statuses=(404,),
        parameters=(_in_path("model"),),
        tag="OpenAI",
    ),
    "/v1/usage": OwnPath(
        "Return tokens, energy and cost by hour, tenant and model.",
        UsageReport,
        text_media_type="text/csv",
        statuses=(403,),
        parameters=(
            _query("start", f"{_TIME} Default: one day before `end`."),
            _query("end", f"{_TIME} Default: now."),
            _query("tenant", "Default: all tenants that the key may see."),
            _query("format", "Format of the answer.", enum=["json", "csv"]),
        ),
    ),
    ROLLOUTS_PATH: OwnPath(
        "Return the state of the last rollout of each model.", RolloutList, statuses=(403,)
    ),
    KEYS_PATH: OwnPath(
        "List the API keys; needs an operator key.",
        KeyList,
        statuses=(400, 403, 429, 501, 503),
        others=(
            OwnPath(
                "Create an API key; needs an operator key.",
                CreatedKey,
                statuses=(400, 403, 429, 501, 503),
                method="post",
                body=NewKeyRequest,
            ),
        ),
    ),
    KEY_PATH: OwnPath(
        "Revoke an API key by its listed id or its SHA-256 digest; needs an operator key.",
        RevokedKey,
        statuses=(400, 403, 429, 501, 503),
        parameters=(_in_path("key_id"),),
        method="delete",
    ),
    LOGS_PATH: OwnPath(
        "Return an overview of the logs of all nodes; needs an operator key.",
        LogReport,
        statuses=(403, 404, 429, 501, 503),
        parameters=(_query("request", "Id of a request, to return its log entries instead."),),
    ),
    ROWS_PATH: OwnPath(
        "Return the usage of this router's node, for the other routers.",
        statuses=(403,),
        parameters=_ROWS,
    ),
    COPIES_PATH: OwnPath(
        "Return this node's copies of the usage of other nodes, for the other routers.",
        statuses=(403,),
        parameters=_ROWS,
    ),
    SPEND_PATH: OwnPath(
        "Return the costs by day and key of this router's node, for the other routers.",
        statuses=(403,),
    ),
    "/openapi.json": OwnPath("Return this document."),
    DRAIN_PATH: OwnPath(
        "Drain a replica, which Serve then replaces, or a node; needs an operator key.",
        Drain,
        statuses=(400, 403, 404, 503),
        parameters=(
            _query(
                "target", "Id of a replica or node, a unique prefix of it, or a node's address."
            ),
        ),
        method="post",
    ),
    GUARDS_PATH: OwnPath(
        "Check texts with the guards.",
        GuardTest,
        statuses=(408, 413, 429, 503),
        method="post",
        body=GuardTestRequest,
    ),
    "/metrics": OwnPath(
        "Return the router's metrics in Prometheus' text format.", str, "text/plain"
    ),
    "/explain": OwnPath("Show a page that explains labels.", str, HTML, is_public=True),
    "/playground": OwnPath("Show a page to try the models.", str, HTML, is_public=True),
    "/dashboard": OwnPath("Show the dashboard.", str, HTML, is_public=True),
    DATA_PATH: OwnPath(
        "Return the last minutes of all routers, second by second.", parameters=(_SINCE,)
    ),
    REPORT_PATH: OwnPath(
        "Return the last minutes of this router, for the other routers.",
        statuses=(403,),
        parameters=(_SINCE,),
    ),
    **BATCH_PATHS,
}

PUBLIC_PATHS = frozenset(path for path, own in OWN_PATHS.items() if own.is_public)
"""Paths that need no API key: probes, and pages, which contain no data and send the key that the
user enters."""
