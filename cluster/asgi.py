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
    joules: float | None = None
    """Its share of the measured energy, where any is; set by ``settle``."""
    cost: float | None = None
    """Its share of what the replica costs, in the configured currency."""
    source: str = ""
    """What measured the joules, or why there are none; "" where nobody accounts."""
    settle: Callable[[], None] | None = None
    """Called before this is said to the router; may still fill in the figures above."""


def usage_of(scope: Scope) -> Usage:
    """Where an application counts what this request takes; kept by nobody where none asked."""
    usage = scope.get("extensions", {}).get(USAGE)
    return usage if isinstance(usage, Usage) else Usage()
