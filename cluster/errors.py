"""Every error that Tandem raises, and the one place that gives each its HTTP form.

TandemError
 ├─ ConfigError                a wrong configuration; names field, value, what is allowed
 ├─ TraceError                 a trace cannot be read; names the file and the line
 ├─ StartError                 the cluster cannot be started (a busy port, a missing model, ...)
 ├─ LinkError                  the connection between a router and a replica
 │   ├─ LinkProtocolError      the peer broke the frame format
 │   ├─ LinkAuthError          the peer does not know the cluster's secret
 │   └─ LinkClosedError        the connection ended with streams open
 │       └─ LinkRefusedError       nothing was started: the replica drains, or is not linked
 ├─ ReplicaRetiredError        a replica was drained on purpose; Serve replaces it
 └─ RequestError               one request cannot be answered; has an HTTP status
     ├─ InvalidRequestError        400
     ├─ AuthenticationError        401
     ├─ PermissionDeniedError      403
     ├─ NotFoundError              404
     ├─ MethodNotAllowedError      405
     ├─ PayloadTooLargeError       413
     ├─ UnprocessableError         422
     ├─ OverloadedError            429, with Retry-After
     ├─ InternalError              500, a defect; the message never holds a traceback
     └─ UnavailableError           503, with Retry-After
         ├─ EngineDeadError        the engine of a replica is gone
         └─ DeviceFailedError      a GPU of a replica failed

HTTP bodies have OpenAI's shape as vLLM writes it: ``{"error": {message, type, param, code}}``.
"""

from typing import Any, ClassVar


class TandemError(Exception):
    """Base of all errors that Tandem raises."""


class ConfigError(TandemError):
    """A value in the configuration is wrong."""


class TraceError(TandemError):
    """A trace of requests cannot be read."""


class StartError(TandemError):
    """The cluster cannot be started."""


class LinkError(TandemError):
    """The connection between a router and a replica failed."""


class LinkProtocolError(LinkError):
    """The peer broke the frame format."""


class LinkAuthError(LinkError):
    """The peer does not know the cluster's secret."""


class LinkClosedError(LinkError):
    """The connection ended while streams were open."""


class LinkRefusedError(LinkClosedError):
    """A stream was not started: the replica drains or has too many, or there is no connection."""


class ReplicaRetiredError(TandemError):
    """A replica has drained and wants to be replaced."""


class RequestError(TandemError):
    """One request cannot be answered.

    Args:
        message: What was wrong and what is allowed, for the caller to read.
        param: The request's field at fault, if one is.
        retry_after_s: Seconds after which trying again makes sense, if it does.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "InternalServerError"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:  # keyword-only arguments must survive Ray's pickling
        return _rebuild, (type(self), self.message, self.param, self.retry_after_s)

    def body(self) -> dict[str, Any]:
        """The JSON body of the HTTP answer."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.status,
            }
        }

    def headers(self) -> dict[str, str]:
        """Further HTTP headers of the answer."""
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(max(1, round(self.retry_after_s)))}


def _rebuild(
    cls: type[RequestError], message: str, param: str | None, retry_after_s: float | None
) -> RequestError:
    return cls(message, param=param, retry_after_s=retry_after_s)


class InvalidRequestError(RequestError):
    """The request is malformed or asks for something impossible."""

    status = 400
    type = "BadRequestError"


class AuthenticationError(RequestError):
    """No API key, or one that is not known."""

    status = 401
    type = "AuthenticationError"


class PermissionDeniedError(RequestError):
    """The API key does not allow this."""

    status = 403
    type = "PermissionDeniedError"


class NotFoundError(RequestError):
    """No such model or path."""

    status = 404
    type = "NotFoundError"


class MethodNotAllowedError(RequestError):
    """The path exists, the HTTP method on it does not."""

    status = 405
    type = "MethodNotAllowedError"


class PayloadTooLargeError(RequestError):
    """The body is larger than the router takes."""

    status = 413
    type = "PayloadTooLargeError"


class UnprocessableError(RequestError):
    """The body is JSON, but not of the shape that the endpoint takes."""

    status = 422
    type = "UnprocessableEntityError"


class OverloadedError(RequestError):
    """The queue is full; nothing was admitted."""

    status = 429
    type = "RateLimitError"


class InternalError(RequestError):
    """A defect of the server."""


class UnavailableError(RequestError):
    """No replica can answer now."""

    status = 503
    type = "ServiceUnavailableError"


class EngineDeadError(UnavailableError):
    """The engine of a replica is gone; Serve replaces the replica."""


class DeviceFailedError(UnavailableError):
    """A GPU of a replica failed; Serve replaces the replica."""


def request_error_for(status: int, message: str, param: str | None = None) -> RequestError:
    """The typed error for an HTTP status that an upstream gave; unknown ones map by their class."""
    exact = {cls.status: cls for cls in _leaf_classes()}
    cls = exact.get(status) or (InvalidRequestError if 400 <= status < 500 else InternalError)
    return cls(message, param=param)


def _leaf_classes() -> list[type[RequestError]]:
    return [
        InvalidRequestError,
        AuthenticationError,
        PermissionDeniedError,
        NotFoundError,
        MethodNotAllowedError,
        PayloadTooLargeError,
        UnprocessableError,
        OverloadedError,
        InternalError,
        UnavailableError,
    ]
