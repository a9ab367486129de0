"""What the client returns."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer of a generator."""

    text: str
    finish_reason: str | None
    """``stop`` (the model ended it), ``length`` (``max_tokens`` did), ``tool_calls`` ..."""
    model: str
    id: str
    usage: Usage
    """Of the whole request; prompts that were sent in one list share one request."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer that is still being made."""

    text: str
    finish_reason: str | None = None
    usage: Usage | None = None
    """In the last piece alone."""


@dataclass(frozen=True, slots=True)
class LabelScore:
    """A label and the model's confidence in it."""

    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Classification:
    """The labels of one text."""

    label: str
    """The best one."""
    score: float
    scores: tuple[LabelScore, ...]
    """Best first."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """One text as a unit vector."""

    vector: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Entity:
    """What stands in a text from the character ``start`` up to ``end``."""

    label: str
    score: float
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document's relevance; ``index`` is its place in the list that was given."""

    index: int
    score: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token for a mask, and its probability."""

    text: str
    score: float
