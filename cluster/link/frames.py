"""The link's wire format: what one frame is, and what each kind carries.

A frame is a header of 10 bytes, little-endian, and a payload::

    payload length u32 | stream id u32 | kind u8 | flags u8 | payload

=========  ===  ===========================================================================
HELLO      0    magic "TNDM" | version u16 | receive window u32 | nonce, 32 bytes
AUTH       0    HMAC-SHA256 over both hellos, 32 bytes (see ``handshake``)
PING PONG  0    nothing; a PING is answered by a PONG at once
LOAD       0    replica to router, unasked: ``Load``
PREFIXES   0    router to replica, once: nothing; asks for what the engine's prefix cache holds.
                Replica to router, from then on: number u64, from 0 | stored u32, a count |
                cleared u8, 0 or 1 | hashes u64, the stored ones, then the removed (see
                ``prefixes``); the first one says ``cleared``, and all there is begins with it
GOAWAY     0    replica to router: opens no further stream; the open ones go on
REQUEST    id   router to replica: ``RequestHead``; END: there is no body
BODY       id   router to replica: a piece of the request's body; END: the last one
RESPONSE   id   replica to router: ``ResponseHead``
DATA       id   replica to router: a piece of the response's body; END: the last one;
                TOKENS: begins with count u16 | count x u32, the ids that the bytes belong to
CANCEL     id   router to replica: the stream is of no interest any more
WINDOW     id   u32, bytes by which the other end may send more on this stream
USAGE      id   replica to router, before the end: ``Usage``
ERROR      id   replica to router, ends the stream: [status, message];
                REFUSED: nothing was started. On stream 0, instead of AUTH: the proof was wrong
=========  ===  ===========================================================================

Heads are msgpack arrays. A sender may start a BODY or DATA frame while its credit on that stream
is positive; the frame's payload is then taken off the credit, which starts at the window that the
receiver's HELLO names. Frames of a stream that has ended are ignored. Pure: no I/O and no clock.
"""

from collections.abc import Sequence
from struct import Struct, error, pack, unpack_from
from typing import Any, Final, TypeVar

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
_LAST_KIND: Final = 15

END: Final = 1
TOKENS: Final = 2
REFUSED: Final = 4
_ALL_FLAGS: Final = 7

HEADER_BYTES: Final = 10
MAX_PAYLOAD_BYTES: Final = 1024 * 1024
CHUNK_BYTES: Final = 64 * 1024
"""Longer bodies are cut into pieces of this size, so that other streams' frames get between."""

Frame = tuple[int, int, int, bytes]
"""Stream id, kind, flags, payload. The payload is a copy: it stays valid as long as it is held."""

_HEADER = Struct("<IIBB")
_U32 = Struct("<I")
pack_header = _HEADER.pack
"""Payload length, stream id, kind, flags -> the header's 10 bytes."""


class RequestHead(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A request without its body, as an ASGI scope names its parts."""

    method: str = "GET"
    path: str = "/"
    """Percent-decoded."""
    raw_path: bytes = b""
    """As the client sent it, without the query; empty: made from ``path``."""
    query_string: bytes = b""
    headers: list[tuple[bytes, bytes]] = []
    """Names in lower case."""
    request_id: str = ""
    """Becomes the header ``x-request-id`` where the headers have none."""
    scheme: str = "http"
    client: tuple[str, int] | None = None

    @property
    def id(self) -> str:
        """The header ``x-request-id``, else ``request_id``."""
        given = (value for name, value in self.headers if name == b"x-request-id")
        return next(given, self.request_id.encode()).decode("latin-1")


class ResponseHead(msgspec.Struct, frozen=True, array_like=True):
    """A response without its body."""

    status: int
    headers: list[tuple[bytes, bytes]] = []


Head = TypeVar("Head", RequestHead, ResponseHead, Load, Usage, tuple[int, str])

encode_head = msgspec.msgpack.Encoder().encode
_DECODERS: dict[Any, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind)
    for kind in (RequestHead, ResponseHead, Load, Usage, tuple[int, str])
}


def decode_head(payload: bytes, kind: type[Head]) -> Head:
    """The head of that type in a payload; LinkProtocolError if it holds something else."""
    try:
        head: Head = _DECODERS[kind].decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as problem:
        raise LinkProtocolError(f"malformed head: {problem}") from None
    return head


def encode_frame(stream_id: int, kind: int, flags: int = 0, payload: bytes = b"") -> bytes:
    """One whole frame."""
    return _HEADER.pack(len(payload), stream_id, kind, flags) + payload


encode_credit = _U32.pack


def decode_credit(payload: bytes) -> int:
    """The bytes that a WINDOW frame grants."""
    if len(payload) != _U32.size:
        raise LinkProtocolError(f"a WINDOW frame carries 4 bytes, not {len(payload)}")
    return int(_U32.unpack(payload)[0])


def encode_tokens(token_ids: Sequence[int]) -> bytes:
    """The prefix of a DATA payload that says which tokens its bytes belong to.

    Raises:
        ValueError: more than 65535 ids, or one that is no u32.
    """
    try:
        return pack(f"<H{len(token_ids)}I", len(token_ids), *token_ids)
    except error as problem:
        raise ValueError(f"token ids do not fit a frame: {problem}") from None


def tokens_end(payload: bytes) -> int:
    """Where the bytes begin in the payload of a DATA frame with the flag TOKENS."""
    if len(payload) >= 2:
        end = 2 + 4 * (payload[0] | payload[1] << 8)
        if end <= len(payload):
            return end
    raise LinkProtocolError("a DATA frame ends within its token ids")


def decode_tokens(payload: bytes) -> tuple[int, ...]:
    """The token ids in a payload that ``tokens_end`` accepted."""
    return unpack_from(f"<{payload[0] | payload[1] << 8}I", payload, 2)


class Decoder:
    """Turns a TCP byte stream into frames, however it is cut.

    After a LinkProtocolError the decoder is spent. ``max_payload_bytes`` may be changed between
    two feeds. It never holds more than one incomplete frame.
    """

    __slots__ = ("_held", "_need", "_pieces", "max_payload_bytes")

    def __init__(self, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> None:
        self.max_payload_bytes = max_payload_bytes
        self._pieces: list[bytes] = []  # of the incomplete frame, joined once it is complete
        self._held = 0
        self._need = 0

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that these bytes complete, in order.

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
                raise LinkProtocolError(_reason(length, limit, kind, flags))
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


def _reason(length: int, limit: int, kind: int, flags: int) -> str:
    if not 0 < kind <= _LAST_KIND:
        return f"unknown frame kind {kind}"
    if flags > _ALL_FLAGS:
        return f"unknown frame flags {flags:#x}"
    return f"a frame of {length} bytes; at most {limit} are allowed here"
