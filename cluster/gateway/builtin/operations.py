"""``/v1/keys`` and ``/v1/logs``: API keys and logs of the cluster, for operators elsewhere."""

import re
from collections.abc import Mapping
from typing import Any, Literal, Protocol, Required, TypedDict
from urllib.parse import unquote

import msgspec

from cluster.admission.keys import ID_CHARS
from cluster.errors import (
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    UnsupportedError,
)
from cluster.gateway.messages import Request, Response, header, json_response, query_of
from cluster.key_file import NewKey
from cluster.operator_api import KEY_PATH, KEYS_PATH, LOGS_PATH, describe_missing_request


class NewKeyRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /v1/keys``."""

    tenant: str
    priority: int = 0
    models: list[str] | None = None
    """Models that the key may use; null: all."""
    guards: list[str] | None = None
    """Guards that check the key's requests; null: those of the tenant."""
    key_cost_per_day: float | None = None
    """Budget of the key alone, in the configured currency."""
    key_cost_per_month: float | None = None
    limits: dict[str, float | None] = {}
    """Fields of the tenant in the key file that change, such as `requests_per_minute`, and
    `cost_per_day` for the budget of the tenant."""


class CreatedKey(TypedDict):
    """A new key."""

    key: str
    """The key itself, which cannot be read again."""
    tenant: str


class KeyList(TypedDict):
    """Keys by id, with the limits of their tenants."""

    object: Literal["list"]
    data: list[dict[str, Any]]


class RevokedKey(TypedDict):
    """A key that is no longer accepted."""

    id: str
    tenant: str
    deleted: bool


class LogEntryInfo(TypedDict):
    """Entry of a log: a line and its continuation lines."""

    file: str
    time: str
    text: str


class LogReport(TypedDict, total=False):
    """Overview of the logs of all nodes, or the entries of one request."""

    problems: Required[list[str]]
    """A line for each node whose logs cannot be read."""
    entries: list[LogEntryInfo]
    """Entries of the request, by time."""
    truncated: bool
    """True if the request has more entries than those returned."""
    bytes: dict[str, int]
    """Sizes of the log files."""
    errors: list[LogEntryInfo]
    failed_requests: list[dict[str, Any]]


class ClusterControl(Protocol):
    """Access to the key file and the logs of the cluster.

    All methods raise InvalidRequestError if the change is refused, UnsupportedError if the cluster
    has no key file that could be changed from here, and UnavailableError if Ray does not answer.
    """

    async def read_logs(self, request_id: str | None) -> dict[str, Any]:
        """Return the fields of a LogReport: the overview, or the entries of one request."""

    async def list_keys(self) -> list[dict[str, Any]]:
        """Return the keys, without their digests."""

    async def add_key(self, new: NewKey, limits: Mapping[str, float | None]) -> str:
        """Create a key and return it."""

    async def revoke_key(self, key_id: str) -> tuple[str, str]:
        """Delete the key with this id or digest; return its id and tenant."""


_ID_OR_DIGEST = re.compile(rf"[0-9a-f]{{{ID_CHARS}}}|[0-9a-f]{{64}}")
_decode = msgspec.json.Decoder(NewKeyRequest).decode


class OperationRoutes:
    """Handlers of the paths; without control they answer 501."""

    def __init__(self, control: ClusterControl | None) -> None:
        self._control = control

    async def logs(self, request: Request) -> Response:
        """Return the overview of the logs, or all lines of one request."""
        control = self._allowed(request, LOGS_PATH)
        request_id = query_of(request).get("request") or None
        found = await control.read_logs(request_id)
        if request_id is not None and not found["entries"]:
            raise NotFoundError(describe_missing_request(request_id, "the logs", found["problems"]))
        return json_response(found)

    async def keys(self, request: Request) -> Response:
        """List the keys, or create one."""
        control = self._allowed(request, KEYS_PATH)
        if request.method != "POST":
            return json_response({"object": "list", "data": await control.list_keys()})
        # Pages of other sites cannot send this type without the consent of the router.
        if not (header(request.headers, b"content-type") or "").startswith("application/json"):
            raise InvalidRequestError("The content type must be application/json.")
        try:
            body = _decode(request.body)
        except msgspec.DecodeError as error:
            raise InvalidRequestError(f"Invalid body: {error}") from None
        fields = msgspec.structs.asdict(body)
        limits = fields.pop("limits")
        key = await control.add_key(NewKey(**fields), limits)
        return json_response(CreatedKey(key=key, tenant=body.tenant))

    async def revoke(self, request: Request) -> Response:
        """Delete a key."""
        control = self._allowed(request, KEY_PATH)
        key_id = unquote(request.path.removeprefix(f"{KEYS_PATH}/"))
        if not _ID_OR_DIGEST.fullmatch(key_id):  # not repeated: it may be a key
            raise InvalidRequestError(
                f"The path must end with the {ID_CHARS}-character id of a key, as GET {KEYS_PATH} "
                "lists it, or with the SHA-256 digest of the key."
            )
        found, tenant = await control.revoke_key(key_id)
        return json_response(RevokedKey(id=found, tenant=tenant, deleted=True))

    def _allowed(self, request: Request, what: str) -> ClusterControl:
        # Also on a router without keys, where everyone else sees everything.
        if not request.identity.is_operator:
            raise PermissionDeniedError(f"{what} needs an operator key.")
        if self._control is None:
            raise UnsupportedError(f"{what} needs Ray.")
        return self._control
