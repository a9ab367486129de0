import contextlib
import itertools
from typing import Any

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
def test_frames_survive_any_cut_of_the_stream(sent: list[f.Frame], cuts: list[int]) -> None:
    data = b"".join(f.encode_frame(*frame) for frame in sent)
    decoder = f.FrameDecoder()
    assert [frame for piece in cut(data, cuts) for frame in decoder.feed(piece)] == sent


@given(some_frames)
def test_frames_survive_byte_by_byte(sent: list[f.Frame]) -> None:
    decoder = f.FrameDecoder()
    data = b"".join(f.encode_frame(*frame) for frame in sent)
    assert [frame for i in range(len(data)) for frame in decoder.feed(data[i : i + 1])] == sent


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_garbage_is_refused_or_awaited_and_never_crashes(pieces: list[bytes]) -> None:
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
        (f.pack_header(0, 1, 16, 0), "kind 16"),
        (f.pack_header(0, 1, f.DATA, 8), "flags 0x8"),
    ],
)
def test_a_bad_header_is_refused_before_its_payload_arrives(header: bytes, reason: str) -> None:
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
    with contextlib.suppress(LinkProtocolError):
        f.tokens_end(payload)


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
    )
    assert f.decode_head(f.encode_head(request), f.RequestHead) == request
    response = f.ResponseHead(200, [(b"a", b"b"), (b"a", b"c")])
    assert f.decode_head(f.encode_head(response), f.ResponseHead) == response
    load = Load(1, 2, 0.5, 3)
    assert f.decode_head(f.encode_head(load), Load) == load


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50), st.binary(max_size=50))
def test_token_ids_round_trip(token_ids: list[int], data: bytes) -> None:
    payload = f.encode_tokens(token_ids) + data
    assert f.decode_tokens(payload) == tuple(token_ids)
    assert payload[f.tokens_end(payload) :] == data


@pytest.mark.parametrize("token_ids", [[-1], [2**32], [0] * 65536, ["a"]])
def test_token_ids_that_do_not_fit_are_refused(token_ids: list[int]) -> None:
    with pytest.raises(ValueError, match="token ids"):
        f.encode_tokens(token_ids)
