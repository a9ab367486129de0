"""ASGI's types: what engines offer, the link carries and the router serves."""

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

USAGE = "tandem.usage"
"""Key of a scope's ``extensions``: the ``Usage`` that the application fills in."""


@dataclass(slots=True)
class Usage:
    """The tokens that a request took, added up until its response ends."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that needed no computing."""
    completion_tokens: int = 0


def usage_of(scope: Scope) -> Usage:
    """Where an application counts what this request takes; kept by nobody where none asked."""
    usage = scope.get("extensions", {}).get(USAGE)
    return usage if isinstance(usage, Usage) else Usage()
