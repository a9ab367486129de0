"""What a request claims of its pool: for whom, how much, how urgently, and until when."""

from dataclasses import dataclass

from cluster.admission import MIN_PRIORITY, OPEN, Identity
from cluster.errors import InvalidRequestError
from cluster.gateway.messages import Headers, header
from cluster.routing import Fingerprint, RequestView
from cluster.routing.fingerprint import EMPTY_FINGERPRINT
from cluster.routing.request import UNKNOWN_REQUEST

TIMEOUT_HEADER = b"x-request-timeout-seconds"
PRIORITY_HEADER = b"x-tandem-priority"
SESSION_HEADER = b"x-session-id"


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request asks of a pool."""

    identity: Identity = OPEN
    work_tokens: float = 1.0
    """Its estimated work."""
    body_bytes: int = 0
    priority: int = 0
    expires_s: float = float("inf")
    """When its place must be there, on the event loop's clock."""
    deadline_s: float = float("inf")
    """When its whole answer must be there; infinite where it did not say."""
    view: RequestView = UNKNOWN_REQUEST
    """What a choice of a replica is made by."""
    text: Fingerprint = EMPTY_FINGERPRINT
    """What was read of its prompt."""
    adapter: str | None = None
    """The LoRA adapter that it names; only replicas that have it can answer."""

    @property
    def has_deadline(self) -> bool:
        """Whether it said until when its answer is of use."""
        return self.deadline_s < float("inf")


def asked_timeout_s(headers: Headers) -> float | None:
    """Seconds until the whole answer is of no use any more; None where none are given.

    Raises:
        InvalidRequestError: the header is no number above 0.
    """
    given = header(headers, TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = 0.0
    if not 0 < timeout_s < float("inf"):
        name = TIMEOUT_HEADER.decode()
        raise InvalidRequestError(f"{name}: a number of seconds above 0", param=name)
    return timeout_s


def asked_priority(headers: Headers, identity: Identity) -> int:
    """The request's class: what it asks for, at most its key's own.

    Raises:
        InvalidRequestError: the header is no whole number.
    """
    given = header(headers, PRIORITY_HEADER)
    if given is None:
        return identity.priority
    try:
        return max(MIN_PRIORITY, min(int(given), identity.priority))
    except ValueError:
        name = PRIORITY_HEADER.decode()
        raise InvalidRequestError(f"{name}: a whole number", param=name) from None
