"""Results that the client returns."""

from dataclasses import dataclass

from cluster.usage import Usage


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer of a generator."""

    text: str
    finish_reason: str | None
    """``stop`` (by the model), ``length`` (by ``max_tokens``), ``tool_calls``, …"""
    model: str
    id: str
    usage: Usage
    """Usage of the whole request; prompts sent in one list share one request."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a streamed answer."""

    text: str
    finish_reason: str | None = None
    usage: Usage | None = None
    """Usage of the request; in the last piece only."""


@dataclass(frozen=True, slots=True)
class LabelScore:
    """A label and the model's confidence in it."""

    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Classification:
    """Labels of one text."""

    label: str
    """Best label."""
    score: float
    """Score of the best label."""
    scores: tuple[LabelScore, ...]
    """Labels and scores, best first."""


@dataclass(frozen=True, slots=True)
class TranscriptSegment:
    """Part of a transcript, with its times in the recording in seconds."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Transcript:
    """Text of a recording."""

    text: str
    language: str | None = None
    """Language; None without segments."""
    duration_s: float | None = None
    """Length of the recording in seconds; None without segments."""
    segments: tuple[TranscriptSegment, ...] = ()


@dataclass(frozen=True, slots=True)
class Embedding:
    """One text as a unit vector."""

    vector: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Entity:
    """An entity in a text, from character ``start`` up to but not including ``end``."""

    label: str
    score: float
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Ranked:
    """Relevance of one document."""

    index: int
    """Position in the list of documents that was passed."""
    score: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token for a mask and its probability."""

    text: str
    score: float


@dataclass(frozen=True, slots=True)
class BatchState:
    """A batch and its progress."""

    id: str
    status: str
    """``validating``, ``in_progress``, ``finalizing``, ``cancelling``, or an end: ``completed``,
    ``failed``, ``expired``, ``cancelled``."""
    num_lines: int
    num_completed: int
    num_failed: int
    output_file_id: str | None
    error_file_id: str | None
    errors: tuple[str, ...] = ()
    """Reasons why a ``failed`` batch did not run."""
    cost: float | None = None
    """Cost of the answers so far; None without prices."""

    @property
    def has_ended(self) -> bool:
        """True if the state does not change any more."""
        return self.status in ("completed", "failed", "expired", "cancelled")
