"""The part of an answer that a router keeps so that another replica can continue it."""

from dataclasses import dataclass, field

import msgspec

from cluster.config import HandoverConfig
from cluster.link import AnswerRecord, RequestHead, ResponseHead
from cluster.link.frames import JOURNAL_FORMAT

_STEP_BYTES = 16 * 1024  # the journal's share of the common limit grows in these steps


@dataclass(slots=True)
class HandoverLimits:
    """Limits of one router's hand-overs; shared by all pools."""

    config: HandoverConfig
    used_bytes: int = 0
    """Bytes that are kept for all answers."""

    def take(self, num_bytes: int) -> bool:
        """Take a part of the common limit, or return False if it is used up."""
        if self.used_bytes + num_bytes > self.config.max_kept_bytes:
            return False
        self.used_bytes += num_bytes
        return True

    def release(self, num_bytes: int) -> None:
        self.used_bytes -= num_bytes


@dataclass(slots=True)
class KeptAnswer:
    """The request of an answer, and the record of what the client has."""

    head: RequestHead
    body: bytes
    limits: HandoverLimits
    resume_key: str
    """Replicas with the same key can continue the answer."""
    record: AnswerRecord = field(default_factory=AnswerRecord)
    excluded: frozenset[str] = frozenset()
    """Replicas that failed with this request."""
    max_journal_bytes: int = _STEP_BYTES
    """Size of the journal from which ``grow`` must be called."""
    num_handovers: int = 0
    _num_stuck: int = 0  # losses since the client last got something
    _bytes_at_loss: int = -1
    _kept_bytes: int = 0

    @classmethod
    def begin(
        cls, head: RequestHead, body: bytes, limits: HandoverLimits, resume_key: str
    ) -> "KeptAnswer | None":
        """Return a new answer, or None if the limits do not allow to keep it."""
        kept_bytes = len(body) + _STEP_BYTES
        if not limits.config.enabled:
            return None
        if kept_bytes > limits.config.max_answer_bytes or not limits.take(kept_bytes):
            return None
        head = msgspec.structs.replace(head, keeps_journal=True, journal_format=JOURNAL_FORMAT)
        return cls(head, body, limits, resume_key, _kept_bytes=kept_bytes)

    def grow(self) -> bool:
        """Take a further part of the limits for the journal; return False if none is left."""
        missing = len(self.record.journal) - self.max_journal_bytes
        if missing <= 0:
            return True
        step = max(missing, _STEP_BYTES)
        if self._kept_bytes + step > self.limits.config.max_answer_bytes:
            return False
        if not self.limits.take(step):
            return False
        self._kept_bytes += step
        self.max_journal_bytes += step
        return True

    def adopt_id(self, response: ResponseHead) -> None:
        """Give replicas that continue the answer the id of the request that began it.

        Engines derive ids in the answer from it. They return it, also to a repeated request.
        """
        header = next((pair for pair in response.headers if pair[0] == b"x-request-id"), None)
        if header is not None and header not in self.head.headers:
            others = [pair for pair in self.head.headers if pair[0] != header[0]]
            self.head = msgspec.structs.replace(self.head, headers=[*others, header])

    def count_loss(self) -> int:
        """Return the replicas that were lost since the client last got something, this one too."""
        num_bytes = self.record.resume().body_bytes
        self._num_stuck = self._num_stuck + 1 if num_bytes == self._bytes_at_loss else 1
        self._bytes_at_loss = num_bytes
        return self._num_stuck

    def request(self) -> tuple[RequestHead, bytes]:
        """Return the request for a replica that continues the answer."""
        head = msgspec.structs.replace(self.head, resume=self.record.resume())
        return head, bytes(self.record.journal) + self.body

    def release(self) -> None:
        """Return the bytes to the common limit; call this once."""
        self.limits.release(self._kept_bytes)
