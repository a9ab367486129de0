"""Record of an answer at the router, from which another replica can continue it."""

from zlib import crc32

from cluster.errors import LinkProtocolError
from cluster.link.frames import JOURNAL, LONG_ENTRIES, NO_JOURNAL, Resume, unpack_entries_size

_PIECES = 16  # checksum of so many pieces at a time, which takes half as long as one by one
_LONG_HEAD_BYTES = 5


class AnswerRecord:
    """Journal of an answer, and length and checksum of its body, as far as they have arrived.

    The replicas that give the answer one after the other share one record.
    """

    __slots__ = ("_checksum", "_num_bytes", "_pieces", "has_journal", "journal")

    def __init__(self) -> None:
        self.journal = bytearray()
        """Entries of all replicas."""
        self.has_journal = True
        """False once a replica does not keep the journal any more."""
        self._pieces: list[bytes] = []  # of the body, not counted yet
        self._num_bytes = 0
        self._checksum = 0

    def add(self, flags: int, payload: bytes) -> bytes:
        """Add the payload of a DATA frame; return its piece of the body.

        Raises:
            LinkProtocolError: The payload ends within the journal's entries.
        """
        if flags & JOURNAL:
            # Fast path, once for each token.
            if (end := payload[0] + 1) <= LONG_ENTRIES and end <= len(payload):
                self.journal += payload[1:end]
                payload = payload[end:]
            else:
                payload = self._add_long(payload)
        pieces = self._pieces
        pieces.append(payload)
        if len(pieces) >= _PIECES:
            self._count_pieces()
        return payload

    def resume(self) -> Resume:
        """Return what a replica must know to continue the answer."""
        self._count_pieces()
        return Resume(len(self.journal), self._num_bytes, self._checksum)

    def _add_long(self, payload: bytes) -> bytes:
        entries, body = split_payload(payload)
        if entries is None:
            self.has_journal = False
        else:
            self.journal += entries
        return body

    def _count_pieces(self) -> None:
        body = b"".join(self._pieces)
        self._pieces.clear()
        self._num_bytes += len(body)
        self._checksum = crc32(body, self._checksum)


def split_payload(payload: bytes) -> tuple[bytes | None, bytes]:
    """Return the entries, None if the journal ends, and the body in the payload of a JOURNAL frame.

    Raises:
        LinkProtocolError: The payload ends within the entries.
    """
    start, size = 1, payload[0] if payload else LONG_ENTRIES
    if size == LONG_ENTRIES and len(payload) >= _LONG_HEAD_BYTES:
        start, size = _LONG_HEAD_BYTES, unpack_entries_size(payload, 1)[0]
        if size == NO_JOURNAL:
            return None, payload[start:]
    end = start + size
    if end > len(payload):
        raise LinkProtocolError("a DATA frame ends within its journal")
    return payload[start:end], payload[end:]
