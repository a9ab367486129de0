"""The link's wire format: frames and their payloads.

A frame is a header of 10 bytes, little-endian, and a payload::

    payload length u32 | stream id u32 | kind u8 | flags u8 | payload

=========  ======  ========================================================================
Kind       Stream  Payload
=========  ======  ========================================================================
HELLO      0       magic "TNDM" | version u16 | receive window u32 | nonce, 32 bytes
AUTH       0       HMAC-SHA256 over both HELLOs, 32 bytes (see ``handshake``)
PING PONG  0       empty; the receiver of a PING sends a PONG at once
LOAD       0       replica to router, unsolicited: ``Load``
PREFIXES   0       router to replica, once: empty; subscribes to the engine's prefix cache.
                   Replica to router from then on: sequence number u64, from 0 | number of
                   stored hashes u32 | cleared u8, 0 or 1 | hashes u64, first the stored
                   ones, then the removed ones. Number 0 is cleared and starts a snapshot
GOAWAY     0       replica to router: takes no new stream; open streams continue
ANSWERS    0       router to replica, once: empty; subscribes to the ids of the kept answers.
                   Replica to router from then on: number of added ids u32 | ids, 16 bytes
                   each, first the added ones, then the removed ones
ADAPTERS   0       router to replica, once: empty; subscribes to the LoRA adapters. Replica to
                   router, at once and after each change: ``Adapters``
REQUEST    id      router to replica: ``RequestHead``; with END there is no body
BODY       id      router to replica: a piece of the request's body; END: the last one. If the
                   head has ``resume``, the journal comes first
RESPONSE   id      replica to router: ``ResponseHead``
DATA       id      replica to router: a piece of the response's body; END: the last one;
                   JOURNAL: starts with size u8 | entries of the answer's journal, of which this
                   and later pieces are the result. From ``LONG_ENTRIES`` on, size is 255 and a
                   u32 with the size follows. ``NO_JOURNAL`` as that size: the journal ends
CANCEL     id      router to replica: stop working on this stream. The replica answers with
                   USAGE, if it counted any tokens, and an empty DATA with END. END: the
                   request will not be repeated, so its answer is dropped
WINDOW     id      u32, bytes that the peer may send in addition on this stream
USAGE      id      replica to router, before the end: ``Usage``
ERROR      id      replica to router, ends the stream: [status, message]; REFUSED: the
                   request was not started. On stream 0, instead of AUTH: wrong secret
=========  ======  ========================================================================

Heads are msgpack arrays. A sender may start a BODY or DATA frame while its credit on that stream
is positive; the size of its piece of the body is then subtracted. Credit starts at the window in
the receiver's HELLO. Frames of a stream that has ended are ignored. No I/O and no clock in this
module.

Unknown kinds and flags end the connection. So an end uses what an older release lacks only after
the other one has asked for it, or announced it (``ReplicaInfo``): a router sends heads with
``keeps_journal`` to replicas that announce journals of its format, and only such heads cause
JOURNAL frames. It sends ANSWERS and ADAPTERS to replicas that announce kept answers and the report
of adapters. Heads grow at their end: an older decoder ignores further fields, a newer one has
defaults for them. ``tests/serve/test_link_compatibility.py`` replays the frames of an earlier
release to both ends.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from struct import Struct, pack, unpack_from
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from cluster.errors import LinkProtocolError
from cluster.load import Load
from cluster.usage import Usage

HELLO: Final = 1
AUTH: Final = 2
PING: Final = 3
PONG: Final = 4
LOAD: Final = 5
GOAWAY: Final = 6
REQUEST: Final = 7
BODY: Final = 8
RESPONSE: Final = 9
DATA: Final = 10
CANCEL: Final = 11
WINDOW: Final = 12
ERROR: Final = 13
USAGE: Final = 14
PREFIXES: Final = 15
ANSWERS: Final = 16
ADAPTERS: Final = 17
_LAST_KIND: Final = 17

END: Final = 1
JOURNAL: Final = 2
REFUSED: Final = 4
_ALL_FLAGS: Final = 7

HEADER_BYTES: Final = 10
MAX_PAYLOAD_BYTES: Final = 1024 * 1024
CHUNK_BYTES: Final = 64 * 1024
"""Size of the pieces of a longer body; frames of other streams are sent between the pieces."""

Frame = tuple[int, int, int, bytes]
"""Stream id, kind, flags, payload. The payload is a copy and stays valid."""

_HEADER = Struct("<IIBB")
_U32 = Struct("<I")
pack_header = _HEADER.pack
"""Pack payload length, stream id, kind and flags into the header's 10 bytes."""


class Resume(msgspec.Struct, frozen=True, array_like=True):
    """Part of an answer that the client has; the replica continues behind it."""

    journal_bytes: int
    """Size of the answer's journal, which precedes the request's body."""
    body_bytes: int
    """Bytes of the answer's body that the client has."""
    checksum: int
    """CRC-32 of these bytes. A replica whose answer begins differently must not continue it."""


class AnswerKey(msgspec.Struct, frozen=True, array_like=True):
    """A request's idempotency key: a later request with the same key gets the same answer."""

    id: bytes
    """Hash of tenant and key, ``ANSWER_ID_BYTES`` long."""
    fingerprint: bytes
    """Hash of the request, which must be the same each time."""


class RequestHead(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A request without its body; the fields are those of an ASGI scope."""

    method: str = "GET"
    path: str = "/"
    """Percent-decoded."""
    raw_path: bytes = b""
    """Path as the client sent it, without the query; derived from ``path`` if empty."""
    query_string: bytes = b""
    headers: list[tuple[bytes, bytes]] = []
    """Header names are in lower case."""
    request_id: str = ""
    """Value of ``x-request-id`` if the headers have none."""
    scheme: str = "http"
    client: tuple[str, int] | None = None
    keeps_journal: bool = False
    """True if the router keeps the journal of the answer."""
    resume: Resume | None = None
    """Set if another replica gave the beginning of the answer."""
    answer_key: AnswerKey | None = None
    """Set if the replica keeps the answer for repetitions of the request."""
    journal_format: int = 1
    """Format of the JOURNAL frames that the router understands; see ``JOURNAL_FORMAT``."""

    @property
    def id(self) -> str:
        """The header ``x-request-id``, or ``request_id`` if there is no such header."""
        values = (value for name, value in self.headers if name == b"x-request-id")
        return next(values, self.request_id.encode()).decode("latin-1")


class ResponseHead(msgspec.Struct, frozen=True, array_like=True):
    """A response without its body."""

    status: int
    headers: list[tuple[bytes, bytes]] = []


class Adapters(msgspec.Struct, frozen=True, array_like=True):
    """LoRA adapters of one replica."""

    loaded: dict[str, str] = {}
    """Path or id of each adapter that it serves, by name."""
    failed: dict[str, str] = {}
    """Reason for each adapter that it should serve and could not load."""


Head = TypeVar("Head", RequestHead, ResponseHead, Adapters, Load, Usage, tuple[int, str])

encode_head = msgspec.msgpack.Encoder().encode
_DECODERS: dict[Any, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind)
    for kind in (RequestHead, ResponseHead, Adapters, Load, Usage, tuple[int, str])
}


def decode_head(payload: bytes, kind: type[Head]) -> Head:
    """Decode a payload as the given type.

    Raises:
        LinkProtocolError: the payload is not of that type.
    """
    try:
        head: Head = _DECODERS[kind].decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as problem:
        raise LinkProtocolError(f"malformed head: {problem}") from None
    return head


def encode_frame(stream_id: int, kind: int, flags: int = 0, payload: bytes = b"") -> bytes:
    return _HEADER.pack(len(payload), stream_id, kind, flags) + payload


encode_credit = _U32.pack


def decode_credit(payload: bytes) -> int:
    if len(payload) != _U32.size:
        raise LinkProtocolError(f"a WINDOW frame carries 4 bytes, not {len(payload)}")
    return int(_U32.unpack(payload)[0])


JOURNAL_FORMAT: Final = 2
"""Format of JOURNAL frames. Routers of format 1 get ``OLD_NO_JOURNAL`` only: their answers stay."""
NO_JOURNAL: Final = 2**32 - 1
OLD_NO_JOURNAL: Final = pack("<II", NO_JOURNAL, 0)
"""Payload that ends a journal in format 1."""
LONG_ENTRIES: Final = 255
MAX_ENTRIES_BYTES: Final = 256 * 1024
"""Size of the journal's entries in one frame; an answer with more is not handed over."""
ENTRIES_SIZES: Final = tuple(bytes([size]) for size in range(LONG_ENTRIES))
"""Sizes below ``LONG_ENTRIES`` as a JOURNAL frame has them before the entries."""
pack_long_size = Struct("<BI").pack
"""Pack ``LONG_ENTRIES`` and a size as a JOURNAL frame has them before the entries."""
unpack_entries_size = _U32.unpack_from


MAX_HASHES: Final = 8192
"""Maximum of stored and of removed hashes in one frame: 128 KiB in all, so that a snapshot does not
delay the frames of other streams."""

_PREFIXES_HEAD = Struct("<QI?")  # sequence number, number of stored hashes, cleared


@dataclass(frozen=True, slots=True)
class PrefixEvents:
    """Changes of one replica's prefix cache, as 64-bit hashes of prefixes of prompt texts.

    Applied in this order: ``cleared`` drops everything received before, then ``removed``, then
    ``stored``. Repeating a hash is harmless.
    """

    stored: Sequence[int] = ()
    removed: Sequence[int] = ()
    cleared: bool = False


def split_events(events: PrefixEvents) -> Iterator[PrefixEvents]:
    """Yield the events in pieces of at most one frame each; at least one piece."""
    yield PrefixEvents(events.stored[:MAX_HASHES], events.removed[:MAX_HASHES], events.cleared)
    longest = max(len(events.stored), len(events.removed))
    for start in range(MAX_HASHES, longest, MAX_HASHES):
        piece = slice(start, start + MAX_HASHES)
        yield PrefixEvents(events.stored[piece], events.removed[piece])


def encode_prefixes(number: int, events: PrefixEvents) -> bytes:
    stored, removed = events.stored, events.removed
    hashes = pack(f"<{len(stored) + len(removed)}Q", *stored, *removed)
    return _PREFIXES_HEAD.pack(number, len(stored), events.cleared) + hashes


def decode_prefixes(payload: bytes) -> tuple[int, PrefixEvents]:
    """Return the sequence number and the events of a PREFIXES frame.

    Raises:
        LinkProtocolError: the payload is malformed.
    """
    num_hashes, rest = divmod(len(payload) - _PREFIXES_HEAD.size, 8)
    if num_hashes < 0 or rest:
        raise LinkProtocolError(f"a PREFIXES frame has an invalid size of {len(payload)} bytes")
    number, num_stored, cleared = _PREFIXES_HEAD.unpack_from(payload)
    if num_stored > num_hashes:
        raise LinkProtocolError(
            f"a PREFIXES frame announces {num_stored} stored hashes but has {num_hashes} in all"
        )
    hashes = unpack_from(f"<{num_hashes}Q", payload, _PREFIXES_HEAD.size)
    return number, PrefixEvents(hashes[:num_stored], hashes[num_stored:], cleared)


ANSWER_ID_BYTES: Final = 16
MAX_ANSWER_IDS: Final = 4096
"""Maximum of ids in one ANSWERS frame."""


def encode_answers(added: Sequence[bytes], removed: Sequence[bytes] = ()) -> bytes:
    """Return the payload of an ANSWERS frame."""
    return _U32.pack(len(added)) + b"".join((*added, *removed))


class AnswerEvents(NamedTuple):
    """Changes of the answers that a replica keeps, by the ids of their keys."""

    added: list[bytes]
    removed: list[bytes]


def decode_answers(payload: bytes) -> AnswerEvents:
    """Return the content of an ANSWERS frame.

    Raises:
        LinkProtocolError: The payload is malformed.
    """
    num_ids, rest = divmod(len(payload) - _U32.size, ANSWER_ID_BYTES)
    if num_ids < 0 or rest or (num_added := int(_U32.unpack_from(payload)[0])) > num_ids:
        raise LinkProtocolError(f"an ANSWERS frame has an invalid size of {len(payload)} bytes")
    starts = range(_U32.size, len(payload), ANSWER_ID_BYTES)
    ids = [payload[start : start + ANSWER_ID_BYTES] for start in starts]
    return AnswerEvents(ids[:num_added], ids[num_added:])


class FrameDecoder:
    """Incremental decoder: bytes of a TCP stream in pieces of any size, out come frames.

    It buffers at most one incomplete frame and must not be used after a LinkProtocolError.
    ``max_payload_bytes`` may be changed between two feeds.
    """

    __slots__ = ("_held", "_need", "_pieces", "max_payload_bytes")

    def __init__(self, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> None:
        self.max_payload_bytes = max_payload_bytes
        self._pieces: list[bytes] = []  # of the incomplete frame, joined once it is complete
        self._held = 0
        self._need = 0

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that these bytes complete, in order.

        Raises:
            LinkProtocolError: an unknown kind or flag, or a payload over the limit.
        """
        if self._pieces:
            self._pieces.append(data)
            self._held += len(data)
            if self._held < self._need:
                return []
            data = b"".join(self._pieces)
            self._pieces.clear()
        frames: list[Frame] = []
        append, unpack, limit = frames.append, _HEADER.unpack_from, self.max_payload_bytes
        position, size, need = 0, len(data), HEADER_BYTES
        while (start := position + HEADER_BYTES) <= size:
            length, stream_id, kind, flags = unpack(data, position)
            if length > limit or kind > _LAST_KIND or flags > _ALL_FLAGS or not kind:
                raise LinkProtocolError(_header_error(length, limit, kind, flags))
            end = start + length
            if end > size:
                need = HEADER_BYTES + length
                break
            append((stream_id, kind, flags, data[start:end]))
            position = end
        if position < size:
            rest = data[position:] if position else data
            self._pieces.append(rest)
            self._held, self._need = len(rest), need
        return frames


def _header_error(length: int, limit: int, kind: int, flags: int) -> str:
    if not 0 < kind <= _LAST_KIND:
        return f"unknown frame kind {kind}"
    if flags > _ALL_FLAGS:
        return f"unknown frame flags {flags:#x}"
    return f"a frame of {length} bytes exceeds the limit of {limit} bytes"
