import contextlib
import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import LinkProtocolError
from cluster.link import frames as f
from cluster.load import Load

payloads = st.binary(max_size=300)
some_frames = st.lists(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 15), st.integers(0, 7), payloads),
    max_size=20,
)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(some_frames, st.lists(st.integers(0, 10_000), max_size=30))
def test_frames_are_decoded_from_pieces_of_any_size(sent: list[f.Frame], cuts: list[int]) -> None:
    data = b"".join(f.encode_frame(*frame) for frame in sent)
    decoder = f.FrameDecoder()
    assert [frame for piece in cut(data, cuts) for frame in decoder.feed(piece)] == sent


@given(some_frames)
def test_frames_are_decoded_from_single_bytes(sent: list[f.Frame]) -> None:
    decoder = f.FrameDecoder()
    data = b"".join(f.encode_frame(*frame) for frame in sent)
    assert [frame for i in range(len(data)) for frame in decoder.feed(data[i : i + 1])] == sent


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_garbage_gives_frames_or_a_protocol_error(pieces: list[bytes]) -> None:
    decoder = f.FrameDecoder()
    with contextlib.suppress(LinkProtocolError):
        for piece in pieces:
            for _, kind, flags, _ in decoder.feed(piece):
                assert 1 <= kind <= 15
                assert flags <= 7


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (f.pack_header(101, 1, f.DATA, 0), "101 bytes"),
        (f.pack_header(0, 1, 0, 0), "kind 0"),
        (f.pack_header(0, 1, 18, 0), "kind 18"),
        (f.pack_header(0, 1, f.DATA, 8), "flags 0x8"),
    ],
)
def test_an_invalid_header_is_refused_before_its_payload_arrives(
    header: bytes, reason: str
) -> None:
    with pytest.raises(LinkProtocolError, match=reason):
        f.FrameDecoder(max_payload_bytes=100).feed(header)


def test_the_largest_payload_is_accepted_in_pieces() -> None:
    payload = bytes(f.MAX_PAYLOAD_BYTES)
    data = f.encode_frame(3, f.DATA, 0, payload)
    decoder = f.FrameDecoder()
    got = [frame for i in range(0, len(data), 999) for frame in decoder.feed(data[i : i + 999])]
    assert got == [(3, f.DATA, 0, payload)]


@given(st.binary(max_size=100))
def test_malformed_payloads_raise_protocol_errors_only(payload: bytes) -> None:
    kinds: list[Any] = [f.RequestHead, f.ResponseHead, Load, tuple[int, str]]
    for kind in kinds:
        with contextlib.suppress(LinkProtocolError):
            f.decode_head(payload, kind)
    with contextlib.suppress(LinkProtocolError):
        f.decode_credit(payload)


def test_heads_round_trip() -> None:
    request = f.RequestHead(
        method="POST",
        path="/v1/ä",
        raw_path=b"/v1/%C3%A4",
        query_string=b"a=1",
        headers=[(b"x", b"\xff")],
        request_id="r-1",
        scheme="https",
        client=("::1", 5),
        keeps_journal=True,
        resume=f.Resume(10, 20, 2**32 - 1),
    )
    assert f.decode_head(f.encode_head(request), f.RequestHead) == request
    response = f.ResponseHead(200, [(b"a", b"b"), (b"a", b"c")])
    assert f.decode_head(f.encode_head(response), f.ResponseHead) == response
    load = Load(1, 2, 0.5, 3)
    assert f.decode_head(f.encode_head(load), Load) == load


def test_heads_of_older_and_newer_versions_are_understood() -> None:
    key = f.AnswerKey(b"i", b"f")
    new = f.RequestHead(path="/x", keeps_journal=True, resume=f.Resume(1, 2, 3), answer_key=key)
    fields = msgspec.msgpack.decode(f.encode_head(new))
    older = msgspec.msgpack.encode(fields[:-4])
    assert f.decode_head(older, f.RequestHead) == f.RequestHead(path="/x")
    newer = msgspec.msgpack.encode([*fields, "a field of a later version"])
    assert f.decode_head(newer, f.RequestHead) == new


hashes = st.lists(st.integers(0, 2**64 - 1), max_size=20)


@given(st.integers(0, 2**64 - 1), hashes, hashes, st.booleans())
def test_prefix_events_round_trip(
    number: int, stored: list[int], removed: list[int], cleared: bool
) -> None:
    payload = f.encode_prefixes(number, f.PrefixEvents(stored, removed, cleared))
    events = f.PrefixEvents(tuple(stored), tuple(removed), cleared)
    assert f.decode_prefixes(payload) == (number, events)


@pytest.mark.parametrize(("num_stored", "num_removed"), [(0, 0), (1, 20_000), (20_000, 9_000)])
def test_pieces_of_prefix_events_fit_into_frames_and_are_complete(
    num_stored: int, num_removed: int
) -> None:
    events = f.PrefixEvents(range(num_stored), range(num_removed), cleared=True)
    pieces = list(f.split_events(events))
    assert [piece.cleared for piece in pieces] == [True, *[False] * (len(pieces) - 1)]
    assert [h for piece in pieces for h in piece.stored] == list(range(num_stored))
    assert [h for piece in pieces for h in piece.removed] == list(range(num_removed))
    largest = max(len(f.encode_prefixes(0, piece)) for piece in pieces)
    head, hash_bytes = 13, 8
    assert largest <= head + 2 * f.MAX_HASHES * hash_bytes < f.MAX_PAYLOAD_BYTES


@given(st.binary(max_size=60))
def test_malformed_prefix_events_are_refused(payload: bytes) -> None:
    try:
        _, events = f.decode_prefixes(payload)
    except LinkProtocolError:
        return
    assert len(payload) == 13 + 8 * (len(events.stored) + len(events.removed))
