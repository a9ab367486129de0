"""The account that a fleet keeps of one replica and of each request there."""

from dataclasses import dataclass, field

from cluster.routing.request import RequestView
from cluster.routing.slots import Reach


@dataclass(eq=False, slots=True)
class Row:
    """One replica; its requests without a first token stand in ``queue`` in their order."""

    id: str
    slot: int
    """-1 once it was removed."""
    capacity: int
    reach: Reach
    queue: "dict[Placement, None]" = field(default_factory=dict)
    head_since: float = 0.0
    """When the prefill of the first in line can have begun."""
    last_first_at: float = 0.0
    queued_tokens: float = 0.0
    """Tokens to be computed of those in the queue."""
    own: int = 0
    """Requests of this router that have not ended."""
    decoding: int = 0
    """Of these, the ones with a first token."""
    decode_tokens: float = 0.0
    """Tokens that the own requests are expected to generate in all."""
    first_at_sum: float = 0.0
    """The sum of the times of their first tokens."""
    others: float = 0.0
    """Requests that it was last said to have from other routers."""
    others_waiting: float = 0.0
    is_kv_full: bool = False


@dataclass(eq=False, slots=True)
class Placement:
    """One request at one replica; made by ``Fleet.placed``, ended once by ``Fleet.ended``."""

    row: Row
    request: RequestView
    cached_tokens: float
    """Prompt tokens that the replica was expected to have cached."""
    work_tokens: float
    """What its prefill was expected to cost, in tokens."""
    begun_at: float
    """When its prefill can have begun: when it was placed, or the one before had its token."""
    prefilled_at: float | None = None
    """When its first token came or, where that is not seen, was expected."""
    is_first_seen: bool = False
    is_over: bool = False
