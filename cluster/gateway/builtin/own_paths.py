"""The router's own paths, for the OpenAPI document."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

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
from cluster.gateway.builtin.own_answers import (
    BatchList,
    BatchObject,
    CapableModels,
    DeletedFile,
    Drain,
    FileList,
    FileObject,
    Health,
    Model,
    Models,
    Readiness,
    RolloutList,
    UsageReport,
)
from cluster.gateway.reporting.dashboard import DATA_PATH, REPORT_PATH
from cluster.gateway.reporting.usage_report import COPIES_PATH, ROWS_PATH
from cluster.operator_api import KEY_PATH, KEYS_PATH, LOGS_PATH

MODEL_PATH = "/v1/models/{model}"
ROLLOUTS_PATH = "/v1/rollouts"
ROLLOUT_PATH = "/v1/rollouts/{model}"
HTML = "text/html"


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
