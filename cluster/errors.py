"""Exceptions of Tandem, and their HTTP form.

TandemError
 ├─ ConfigError                    invalid configuration; names field, value and allowed values
 ├─ TraceError                     unreadable request trace; names file and line
 ├─ StartError                     the cluster cannot be started or stopped
 │   └─ RayIncompatibleError           the installed Ray lacks something that Tandem relies on
 ├─ BuildError                     a default model cannot be built
 ├─ RolloutError                   a new version of a model was not promoted
 ├─ DataError                      unusable file of training texts; names file and line
 ├─ LinkError                      connection between a router and a replica failed
 │   ├─ LinkProtocolError              the peer violated the protocol
 │   ├─ LinkAuthError                  the peer does not have the cluster's secret
 │   └─ LinkClosedError                the connection closed with open streams
 │       └─ LinkRefusedError               the stream did not start and can be retried elsewhere
 ├─ ReplicaRetiredError            a drained replica asks Serve to replace it
 └─ RequestError                   a request fails with an HTTP status
     ├─ InvalidRequestError            400
     │   ├─ ContextLengthError             the prompt is longer than the model's context
     │   ├─ GuardBlockedError              a guard refuses the prompt
     │   └─ GuardUnreadableError           a guard cannot read a part of the request
     ├─ AuthenticationError            401
     ├─ PermissionDeniedError          403
     ├─ NotFoundError                  404
     ├─ MethodNotAllowedError          405, with Allow
     ├─ RequestTimeoutError            408
     ├─ PayloadTooLargeError           413
     ├─ UnprocessableError             422
     ├─ HeadersTooLargeError           431
     ├─ OverloadedError                429, with Retry-After
     │   └─ QuotaExhaustedError            a tenant's quota is exhausted
     ├─ InternalError                  500, a bug
     ├─ UnsupportedError               501
     └─ UnavailableError               503, with Retry-After
         ├─ ReplicaLostError               a replica was lost before it answered
         ├─ EngineDeadError                the engine of a replica died
         ├─ DeviceFailedError              a GPU of a replica failed
         └─ HandoverError                  a replica cannot continue another one's answer

HTTP bodies have OpenAI's format as vLLM writes it: ``{"error": {message, type, param, code}}``.
``code`` is the status, or a word of OpenAI's by which clients recognize the error.
``request_error_for`` maps HTTP statuses of upstream servers back to these classes.
"""

import re
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

MAX_MESSAGE_CHARS = 2000
"""Longest message of a ``RequestError``: it may quote what a client sent."""
MAX_PARAM_CHARS = 200


class TandemError(Exception):
    """Base class of all exceptions of Tandem."""


class ConfigError(TandemError):
    """The configuration is invalid."""


class TraceError(TandemError):
    """A request trace cannot be read."""


class StartError(TandemError):
    """The cluster cannot be started or stopped."""


class BuildError(TandemError):
    """A default model cannot be built."""


class RolloutError(TandemError):
    """A new version of a model was not promoted."""


class DataError(TandemError):
    """A file of training texts cannot be used."""


class RayIncompatibleError(StartError):
    """The installed Ray lacks a private name that Tandem uses; see ``cluster.ray_internals``."""


class LinkError(TandemError):
    """The connection between a router and a replica failed."""


class LinkProtocolError(LinkError):
    """The peer violated the protocol."""


class LinkAuthError(LinkError):
    """The peer does not have the cluster's secret."""


class LinkClosedError(LinkError):
    """The connection closed with open streams."""


class LinkRefusedError(LinkClosedError):
    """The stream did not start: no connection, or the replica is draining or full."""


class ReplicaRetiredError(TandemError):
    """A drained replica asks Serve to replace it."""


class RequestError(TandemError):
    """A request fails with an HTTP status.

    Args:
        message: Description of the problem and the remedy, for the client; shortened.
        param: Invalid field of the request, if any.
        retry_after_s: Time in seconds after which a retry may succeed, if any.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "InternalServerError"
    """Name of the error in the body, as vLLM and OpenAI use it."""
    code: ClassVar[str | None] = None
    """OpenAI's code of the error; None if the body has the status instead."""

    def __init_subclass__(cls, status: int | None = None, type: str | None = None) -> None:
        if status is not None and type is not None:
            cls.status, cls.type = status, type

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        self.message = shorten(message, MAX_MESSAGE_CHARS)
        super().__init__(self.message)
        self.param = None if param is None else shorten(param, MAX_PARAM_CHARS)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:  # keyword-only arguments must survive Ray's pickling
        remake = partial(type(self), param=self.param, retry_after_s=self.retry_after_s)
        return remake, (self.message,)

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param}
        return {"error": {**error, "code": self.code or self.status}}

    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(max(1, round(self.retry_after_s)))}


class InvalidRequestError(RequestError, status=400, type="BadRequestError"):
    """The request is invalid."""


class ContextLengthError(InvalidRequestError):
    """The prompt is longer than the model's context."""

    code = "context_length_exceeded"


class GuardBlockedError(InvalidRequestError):
    """A guard refuses the prompt."""

    code = "content_filter"
    guard: str = ""
    """Name of the guard; empty if the error comes from another server."""

    @classmethod
    def by(cls, guard: str, label: str) -> "GuardBlockedError":
        """Return the error for a prompt in which a guard found ``label``."""
        error = cls(f"The guard `{guard}` refuses the prompt: {label}.")
        error.guard = guard
        return error

    def headers(self) -> dict[str, str]:
        return {"x-tandem-guard": f"{self.guard}=blocked"} if self.guard else {}


class GuardUnreadableError(InvalidRequestError):
    """A guard cannot read a part of the request."""

    guard: str = ""

    @classmethod
    def by(cls, guard: str, what: str) -> "GuardUnreadableError":
        """Return the error for a part of a request."""
        error = cls(f"The guard `{guard}` cannot check {what}.")
        error.guard = guard
        return error

    def headers(self) -> dict[str, str]:
        return {"x-tandem-guard": f"{self.guard}=unreadable"} if self.guard else {}


class AuthenticationError(RequestError, status=401, type="AuthenticationError"):
    """The API key is missing or unknown."""


class PermissionDeniedError(RequestError, status=403, type="PermissionDeniedError"):
    """The API key does not permit the request."""


class NotFoundError(RequestError, status=404, type="NotFoundError"):
    """The model or path does not exist."""


class MethodNotAllowedError(RequestError, status=405, type="MethodNotAllowedError"):
    """The path does not support the HTTP method."""

    allow: tuple[str, ...] = ()
    """Methods that the path supports."""

    @classmethod
    def for_path(cls, path: str, method: str, allow: Iterable[str]) -> "MethodNotAllowedError":
        """Return the error for a path that supports the methods ``allow`` only."""
        methods = tuple(allow)
        error = cls(f"{path} supports {' and '.join(methods)}, not {method}.")
        error.allow = methods
        return error

    def headers(self) -> dict[str, str]:
        return {"allow": ", ".join(self.allow)} if self.allow else {}


class RequestTimeoutError(RequestError, status=408, type="RequestTimeoutError"):
    """The client sends its request too slowly, or the deadline that it set has passed."""


class PayloadTooLargeError(RequestError, status=413, type="PayloadTooLargeError"):
    """The request body exceeds the limit."""


class UnprocessableError(RequestError, status=422, type="UnprocessableEntityError"):
    """The request is understood and contradicts an earlier one."""


class HeadersTooLargeError(RequestError, status=431, type="RequestHeaderFieldsTooLargeError"):
    """The headers and path of a request exceed the limit."""


class OverloadedError(RequestError, status=429, type="RateLimitError"):
    """A limit of load or quota was reached; the request was not admitted."""


class QuotaExhaustedError(OverloadedError):
    """A quota of the tenant is exhausted; other models would not admit the request either."""


class InternalError(RequestError):
    """A bug in the server; the message never contains a traceback."""


class UnsupportedError(RequestError, status=501, type="NotImplementedError"):
    """The model or engine does not support the request."""


class UnavailableError(RequestError, status=503, type="ServiceUnavailableError"):
    """No replica can serve the request now."""


class ReplicaLostError(UnavailableError):
    """The replicas that computed the answer were lost; the request may have been the cause."""


class EngineDeadError(UnavailableError):
    """The engine of a replica died; Serve replaces the replica."""


class DeviceFailedError(UnavailableError):
    """A GPU of a replica failed; Serve replaces the replica."""


class HandoverError(UnavailableError):
    """A replica cannot continue the answer that another one began."""

    DIFFERS = "The replica was lost, and no other can continue its answer exactly; try again."
    """Message of a replica whose own answer begins differently; routers know the error by it."""


def shorten(text: str, max_chars: int) -> str:
    """Return a text that UTF-8 can encode, without its middle if it is too long."""
    if len(text) > max_chars:
        half = max_chars // 2
        text = f"{text[:half]} … {len(text) - 2 * half} characters … {text[-half:]}"
    return text.encode(errors="replace").decode()


_CONTEXT_LENGTH = re.compile(r"maximum (context|model)\s+length")
"""In vLLM's messages about prompts over the context; their ``code`` is the status."""


def request_error_for(
    status: int, message: str, param: str | None = None, code: object = None
) -> RequestError:
    """Return the exception for an upstream error; unknown statuses become 400 or 500."""
    is_context_length = code == ContextLengthError.code or _CONTEXT_LENGTH.search(message)
    if status == ContextLengthError.status and is_context_length:
        return ContextLengthError(message, param=param)
    if status == GuardBlockedError.status and code == GuardBlockedError.code:
        return GuardBlockedError(message, param=param)
    if message == HandoverError.DIFFERS:
        return HandoverError(message, param=param)
    by_status = {cls.status: cls for cls in RequestError.__subclasses__()}
    default = InvalidRequestError if 400 <= status < 500 else InternalError
    return by_status.get(status, default)(message, param=param)
