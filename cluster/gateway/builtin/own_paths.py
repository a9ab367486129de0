"""The router's own paths and the types of their answers, for the OpenAPI document."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

from cluster.gateway.builtin.drain import DRAIN_PATH
from cluster.gateway.builtin.guards import GUARDS_PATH, GuardTest, GuardTestRequest
from cluster.gateway.reporting.dashboard import DATA_PATH, REPORT_PATH
from cluster.gateway.reporting.usage_report import COPIES_PATH, ROWS_PATH

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

    kind: Literal["generator", "classifier"]
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


class UsageReport(TypedDict):
    """Usage by hour, tenant and model."""

    object: Literal["list"]
    currency: str | None
    data: list[UsageHour]
    total: UsageTotal


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
    method: Literal["get", "post"] = "get"
    body: Any = None
    """Type of the request's JSON body, if any."""


def _query(name: str, description: str, **schema: Any) -> dict[str, Any]:
    kind = {"type": "string", **schema}
    return {"name": name, "in": "query", "description": description, "schema": kind}


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
    "/v1/models": OwnPath("List the models.", Models),
    "/models": OwnPath("List the models with their capabilities (Infinity).", CapableModels),
    MODEL_PATH: OwnPath(
        "Return one model.",
        Model,
        statuses=(404,),
        parameters=(
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}},
        ),
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
    "/dashboard": OwnPath("Show the dashboard.", str, HTML, is_public=True),
    DATA_PATH: OwnPath(
        "Return the last minutes of all routers, second by second.", parameters=(_SINCE,)
    ),
    REPORT_PATH: OwnPath(
        "Return the last minutes of this router, for the other routers.",
        statuses=(403,),
        parameters=(_SINCE,),
    ),
}

PUBLIC_PATHS = frozenset(path for path, own in OWN_PATHS.items() if own.is_public)
"""Paths that need no API key: probes, and pages, which contain no data and send the key that the
user enters."""
