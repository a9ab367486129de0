"""Files and batches as they are stored, and their JSON forms in OpenAI's API."""

from secrets import token_hex
from typing import Any, Literal

import msgspec

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/classify")
"""Paths that the lines of a batch may request."""

Status = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
FINAL = frozenset({"failed", "completed", "expired", "cancelled"})
"""States that do not change any more."""
Purpose = Literal["batch", "batch_output"]


def new_id(prefix: str) -> str:
    """Return a new id that cannot be guessed."""
    return prefix + token_hex(16)


class StoredFile(msgspec.Struct, frozen=True):
    """A file of a tenant; its content is on disk under its id."""

    id: str
    tenant: str
    filename: str
    purpose: Purpose
    bytes: int
    created_at: int
    """Unix time in seconds."""
    expires_at: int

    def as_json(self) -> dict[str, Any]:
        """Return OpenAI's form."""
        fields = msgspec.structs.asdict(self)
        del fields["tenant"]
        return {**fields, "object": "file", "status": "processed"}


class LineError(msgspec.Struct, frozen=True):
    """Error in a line of an input file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Batch(msgspec.Struct, frozen=True, omit_defaults=True):
    """A batch; times are Unix times in seconds."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    output_id: str
    """Id of its output file, which exists once there is any output."""
    error_id: str
    """Id of its error file, which exists once a line failed."""
    key: str = ""
    """Id of the key that created it, whose budget applies, too."""
    models: tuple[str, ...] | None = None
    """Models that the key may use; None: all."""
    metadata: dict[str, str] | None = None
    status: Status = "validating"
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    total: int = 0
    """Lines."""
    completed: int = 0
    """Lines with a successful answer."""
    failed: int = 0
    """Lines with an error."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    joules: float = 0.0
    cost: float = 0.0
    """Sum over the answers, in the configured currency."""
    errors: tuple[LineError, ...] = ()
    """Reasons why the batch failed before it ran."""

    @property
    def is_final(self) -> bool:
        """True if the state does not change any more."""
        return self.status in FINAL

    def as_json(self, currency: str | None) -> dict[str, Any]:
        """Return OpenAI's form; ``currency`` is None if no price is configured."""
        is_final = self.is_final
        times = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at")
        errors = [msgspec.structs.asdict(error) for error in self.errors]
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_id if is_final and self.completed else None,
            "error_file_id": self.error_id if is_final and self.failed else None,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **{name: getattr(self, name) for name in times},
            "cancelling_at": self.cancelling_at,
            "cancelled_at": self.cancelled_at,
            "request_counts": {
                "total": self.total,
                "completed": self.completed,
                "failed": self.failed,
            },
            "usage": {
                "input_tokens": self.prompt_tokens,
                "input_tokens_details": {"cached_tokens": self.cached_tokens},
                "output_tokens": self.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self.prompt_tokens + self.completion_tokens,
            },
            "metadata": self.metadata,
            "tandem": {
                "joules": self.joules or None,
                "cost": self.cost if currency is not None else None,
                "currency": currency,
            },
        }
