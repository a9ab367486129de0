"""What is known of a request before it is placed, and after it ended."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestView:
    """A request as a policy sees it."""

    prompt_tokens: float
    """Estimated, where the router does not tokenize."""
    completion_tokens: float = 0.0
    """Expected; 0 where nothing is generated."""
    prefix: tuple[int, ...] = ()
    """64-bit hashes of growing prefixes of the prompt, the shortest first."""
    prefix_tokens: tuple[float, ...] = ()
    """Prompt tokens up to the end of each prefix."""
    session: str | None = None
    """Requests of one session belong together."""
    adapter: str | None = None
    """The LoRA adapter that it needs."""
    streamed: bool = False
    """Its first token will be seen, so that one that does not come says something."""


UNREAD = RequestView(prompt_tokens=0.0)
"""A request of which nothing is known."""
