"""What replicas tell routers of their prefix caches: the payload of PREFIXES frames. Pure."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from struct import Struct, pack, unpack_from
from typing import Final, Protocol

from cluster.errors import LinkProtocolError

PIECE_HASHES: Final = 8192
"""Hashes in one frame at most: 64 KiB, so that other frames get between."""

_HEAD = Struct("<QI?")  # number of the frame on its connection, hashes that are stored, cleared


@dataclass(frozen=True, slots=True)
class PrefixEvents:
    """What changed in one replica's cache, as 64-bit hashes of prefixes of prompts' texts.

    In this order: where ``cleared``, nothing that was told before holds; then ``removed``, then
    ``stored``. It does no harm to be told twice.
    """

    stored: Sequence[int] = ()
    removed: Sequence[int] = ()
    cleared: bool = False


class PrefixSource(Protocol):
    """What knows a replica's cache; used on one event loop, without blocking."""

    on_news: Callable[[], None] | None
    """Called once there is something to ``take``; set by who takes it."""

    def take(self) -> PrefixEvents | None:
        """What changed since the last call; None: nothing."""

    def snapshot(self) -> Sequence[int]:
        """All that is held now, what was not taken yet included."""


def pieces_of(events: PrefixEvents) -> Iterator[PrefixEvents]:
    """The same in events that each fit a frame; at least one."""
    yield PrefixEvents(events.stored[:PIECE_HASHES], events.removed[:PIECE_HASHES], events.cleared)
    longest = max(len(events.stored), len(events.removed))
    for start in range(PIECE_HASHES, longest, PIECE_HASHES):
        piece = slice(start, start + PIECE_HASHES)
        yield PrefixEvents(events.stored[piece], events.removed[piece])


def encode_prefixes(number: int, events: PrefixEvents) -> bytes:
    """The payload of one frame, the ``number``-th of its kind on its connection."""
    stored, removed = events.stored, events.removed
    hashes = pack(f"<{len(stored) + len(removed)}Q", *stored, *removed)
    return _HEAD.pack(number, len(stored), events.cleared) + hashes


def decode_prefixes(payload: bytes) -> tuple[int, PrefixEvents]:
    """A frame's number and its events.

    Raises:
        LinkProtocolError: the payload is malformed.
    """
    num_hashes, rest = divmod(len(payload) - _HEAD.size, 8)
    if num_hashes < 0 or rest:
        raise LinkProtocolError(f"a PREFIXES frame of {len(payload)} bytes")
    number, num_stored, cleared = _HEAD.unpack_from(payload)
    if num_stored > num_hashes:
        raise LinkProtocolError(f"a PREFIXES frame of {num_hashes} hashes says {num_stored}")
    hashes = unpack_from(f"<{num_hashes}Q", payload, _HEAD.size)
    return number, PrefixEvents(hashes[:num_stored], hashes[num_stored:], cleared)
