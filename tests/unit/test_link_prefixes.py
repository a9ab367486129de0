import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import LinkProtocolError
from cluster.link.frames import (
    MAX_HASHES,
    MAX_PAYLOAD_BYTES,
    PrefixEvents,
    decode_prefixes,
    encode_prefixes,
    split_events,
)

hashes = st.lists(st.integers(0, 2**64 - 1), max_size=20)


@given(st.integers(0, 2**64 - 1), hashes, hashes, st.booleans())
def test_events_survive(number: int, stored: list[int], removed: list[int], cleared: bool) -> None:
    payload = encode_prefixes(number, PrefixEvents(stored, removed, cleared))
    said = PrefixEvents(tuple(stored), tuple(removed), cleared)
    assert decode_prefixes(payload) == (number, said)


@pytest.mark.parametrize(("num_stored", "num_removed"), [(0, 0), (1, 20_000), (20_000, 9_000)])
def test_pieces_fit_frames_and_lose_nothing(num_stored: int, num_removed: int) -> None:
    events = PrefixEvents(range(num_stored), range(num_removed), cleared=True)
    pieces = list(split_events(events))
    assert [piece.cleared for piece in pieces] == [True, *[False] * (len(pieces) - 1)]
    assert [h for piece in pieces for h in piece.stored] == list(range(num_stored))
    assert [h for piece in pieces for h in piece.removed] == list(range(num_removed))
    most = 2 * MAX_HASHES * 8 + 100
    assert max(len(encode_prefixes(0, piece)) for piece in pieces) < most < MAX_PAYLOAD_BYTES


@given(st.binary(max_size=60))
def test_a_malformed_payload_is_refused(payload: bytes) -> None:
    try:
        _, events = decode_prefixes(payload)
    except LinkProtocolError:
        return
    assert len(payload) == 13 + 8 * (len(events.stored) + len(events.removed))
