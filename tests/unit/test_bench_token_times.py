from hypothesis import given
from hypothesis import strategies as st

from benchmarks.token_times import StreamReader

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(text: str) -> bytes:
    return b'data: {"choices":[{"text":"' + text.encode() + b'"}]}\n\n'


def test_ttft_and_itl_are_measured_at_each_token() -> None:
    reader = StreamReader(sent_s=10.0)
    assert not reader.feed(HEAD, 10.5)
    assert reader.ttft_s is None
    assert not reader.feed(chunk(event("a")), 11.0)
    assert not reader.feed(chunk(event("b")), 11.25)
    assert not reader.feed(chunk(event("c") + event("d")), 12.25)
    assert not reader.feed(chunk(b"data: [DONE]\n\n"), 12.5)
    assert reader.feed(b"0\r\n\r\n", 12.5)
    assert reader.ttft_s == 1.0
    assert reader.itl_s == [0.25, 1.0, 0.0]


def test_text_that_looks_like_the_last_chunk_does_not_end_the_response() -> None:
    reader = StreamReader(0.0)
    assert not reader.feed(HEAD + chunk(event("a")) + b"x\r\n0\r\n\r\n", 1.0)
    assert reader.feed(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n", 2.0)


@given(st.lists(st.integers(1, 400)), st.integers(1, 9))
def test_results_do_not_depend_on_how_the_bytes_are_split(cuts: list[int], num_tokens: int) -> None:
    events = [event(f"w{index}") for index in range(num_tokens)]
    whole = HEAD + b"".join(map(chunk, [*events, b"data: [DONE]\n\n"])) + b"0\r\n\r\n"
    reader, ends = StreamReader(0.0), []
    for size in [*cuts, len(whole)]:
        piece, whole = whole[:size], whole[size:]
        if piece:
            ends.append(reader.feed(piece, 1.0))
    assert ends == [False] * (len(ends) - 1) + [True]
    assert reader.ttft_s == 1.0
    assert reader.itl_s == [0.0] * (num_tokens - 1)
