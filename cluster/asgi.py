"""ASGI types, and the usage counter in the scope."""

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


def usage_of(scope: Scope) -> UsageCounter:
    """Return the counter that the application fills in; an unread one if the scope has none."""
    usage = scope.get("extensions", {}).get(USAGE)
    return usage if isinstance(usage, UsageCounter) else UsageCounter()
