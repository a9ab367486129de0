"""Keys of the overload benchmark, from made-up responses."""

import pytest

from benchmarks.overload.scenario import (
    ALONE,
    FLOODS,
    LEVELS,
    SMALL,
    VICTIM,
    PhaseResult,
    RequestResult,
    Response,
    ResponseReader,
    Scenario,
    compute_keys,
)


def results(*ttfts_s: float | None) -> PhaseResult:
    """Return one request of each tenant and, for the victim, one for each TTFT."""
    floods = [RequestResult(name, 16, 3.0, 0.5, 200, True) for name in ("flood", "heavy")]
    victim = [RequestResult(VICTIM, 16, 3.0, 0.5, 200, True, ttft_s) for ttft_s in ttfts_s]
    return PhaseResult([*floods, *victim], 0.0)


def test_the_victims_ttft_is_compared_with_its_own_when_alone() -> None:
    phases = {level: results() for level in (*LEVELS, FLOODS)}
    keys = compute_keys(Scenario(), {**phases, SMALL: results(0.05, 0.3), ALONE: results(0.1)})
    assert keys["victim_ttft_p99_ratio"] == pytest.approx(3.0)
    keys = compute_keys(Scenario(), {**phases, SMALL: results(0.05, None), ALONE: results(0.1)})
    assert keys["victim_ttft_ms_p99"] == Scenario().deadline_s * 1e3, "it got no token"


def test_a_stream_without_its_last_event_is_incomplete() -> None:
    reader = ResponseReader(streamed=True)
    for piece in (b"HTTP/1.1 200 OK\r\n\r\nda", b'ta: {"text": "a"}\n\n'):
        reader.feed(piece)
    cut = reader.response(200)
    assert cut.status == 0
    assert cut.ttft_s is not None
    reader.feed(b"data: [DO")
    reader.feed(b"NE]\n\n")
    assert reader.response(200).status == 200
    assert reader.response(429).status == 429


def test_a_response_that_is_not_streamed_has_no_ttft() -> None:
    reader = ResponseReader(streamed=False)
    reader.feed(b'data: {"text": "a"}')
    assert reader.response(200) == Response(200, None)
