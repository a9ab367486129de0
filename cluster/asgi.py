"""ASGI types, and Tandem's extensions of the scope: the usage counter and the journal."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from cluster.usage import UsageCounter

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

USAGE = "tandem.usage"
"""Key of a scope's ``extensions``: the ``UsageCounter`` that the application fills in."""
JOURNAL = "tandem.journal"
"""Key of a scope's ``extensions``: the ``Journal`` of an answer that may be handed over."""
IS_CANCELLED = "tandem.is_cancelled"
"""Key of a scope's ``extensions``: a function that returns True if the client has cancelled the
request. False if its connection was lost, so that it may repeat the request."""
WRITE = "tandem.write"
"""Key of a scope's ``extensions``: a function that writes a piece of the response's body at once.
It returns False if the piece must be sent as usual, because the client reads too slowly."""


class Journal:
    """Progress of one answer, from which another replica can continue it.

    The application adds entries, each before it sends the part of the body that follows from it.
    It defines their format; a router only keeps them.
    """

    __slots__ = ("_is_closed", "earlier", "unsent")

    def __init__(self) -> None:
        self.earlier = b""
        """Entries of the replicas that gave the answer so far. Complete once the request's body has
        been received; the application sends the same body again before it continues."""
        self.unsent = b""
        """Entries that have not been sent to the router."""
        self._is_closed = False

    def add(self, entry: bytes) -> None:
        if not self._is_closed:
            self.unsent += entry

    def close(self) -> None:
        """Drop this and all further entries: the answer is not handed over any more."""
        self._is_closed, self.unsent = True, b""


async def read_body(receive: Receive) -> bytes | None:
    """Return the whole body of a request, or None if the client disconnected before its end."""
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)


def usage_of(scope: Scope) -> UsageCounter:
    """Return the counter that the application fills in; an unread one if the scope has none."""
    usage = scope.get("extensions", {}).get(USAGE)
    return usage if isinstance(usage, UsageCounter) else UsageCounter()


def is_cancelled_of(scope: Scope) -> Callable[[], bool]:
    """Return the function for ``IS_CANCELLED``; it returns False if the scope has none."""
    found: Callable[[], bool] = scope.get("extensions", {}).get(IS_CANCELLED, bool)
    return found


def write_of(scope: Scope) -> Callable[[bytes], bool] | None:
    """Return the function for ``WRITE``; None if the scope has none."""
    found: Callable[[bytes], bool] | None = scope.get("extensions", {}).get(WRITE)
    return found


def journal_of(scope: Scope) -> Journal | None:
    """Return the journal that the application must keep; None if the answer stays here."""
    journal = scope.get("extensions", {}).get(JOURNAL)
    return journal if isinstance(journal, Journal) else None
