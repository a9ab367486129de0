"""Built-in traces have the published shapes; trace files are read or rejected."""

import statistics
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import TraceError
from cluster.simulation.arrivals import arrivals, bursts, constant, daily
from cluster.simulation.trace_files import read_trace
from cluster.simulation.traces import BUILTIN_TRACES, load_trace


@pytest.mark.parametrize("name", BUILTIN_TRACES)
def test_a_builtin_trace_is_determined_by_its_seed(name: str) -> None:
    first, again, other = (load_trace(name, None, 300, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    times = [request.arrival_s for request in first.requests]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < 300
    for request in first.requests:
        assert len(request.blocks) == request.prompt_tokens // first.block_tokens
        total = request.prompt_tokens + request.completion_tokens - 1
        blocks = len(request.blocks) + len(request.answer_blocks)
        assert not request.answer_blocks or blocks == total // first.block_tokens


@pytest.mark.parametrize(
    ("name", "prompt", "answer", "hits"),
    [
        ("conversation", 12_035, 343, 0.37),  # counted in Mooncake's conversation_trace
        ("toolagent", 8596, 182, 0.59),  # Mooncake's table
        ("chat", 761, 265, None),  # BurstGPT's conversation log
    ],
)
def test_trace_shapes_match_the_published_ones(
    name: str, prompt: float, answer: float, hits: float | None
) -> None:
    trace = load_trace(name, None, 3600)
    assert statistics.fmean(r.prompt_tokens for r in trace.requests) == pytest.approx(
        prompt, rel=0.15
    )
    assert statistics.fmean(r.completion_tokens for r in trace.requests) == pytest.approx(
        answer, rel=0.1
    )
    assert hits is None or trace.max_hit_rate == pytest.approx(hits, abs=0.06)


def test_arrivals_have_the_requested_rate_and_follow_the_curve() -> None:
    rng = np.random.default_rng(0)
    for curve in (constant, daily(7200), bursts(np.random.default_rng(3), 7200)):
        assert len(arrivals(rng, 10, 7200, curve, 0.5)) == pytest.approx(72_000, rel=0.05)
    times = arrivals(rng, 10, 7200, daily(7200))
    middle = sum(3000 < t < 4200 for t in times)
    ends = sum(t < 600 or t > 6600 for t in times)
    assert middle > 5 * ends


def test_gamma_gaps_are_bursty() -> None:
    rng = np.random.default_rng(0)
    steady, clumped = (np.diff(arrivals(rng, 10, 3600, constant, shape)) for shape in (1.0, 0.25))
    assert np.std(steady) / np.mean(steady) == pytest.approx(1.0, rel=0.1)
    assert np.std(clumped) / np.mean(clumped) == pytest.approx(2.0, rel=0.1)


def test_a_hot_prefix_appears_suddenly() -> None:
    trace = load_trace("hot-prefix", 20, 900)
    hot = max(
        {r.blocks[0] for r in trace.requests if r.blocks},
        key=lambda block: sum(r.blocks[:1] == (block,) for r in trace.requests),
    )
    times = [r.arrival_s for r in trace.requests if r.blocks[:1] == (hot,)]
    assert min(times) >= 300
    assert len(times) > 0.2 * len(trace.requests)


GOOD = '{"timestamp": 27482, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 2353]}'


def test_mooncake_traces_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(GOOD + "\n\n" + GOOD.replace("27482", "0") + "\n")
    trace = read_trace(path)
    assert [request.arrival_s for request in trace.requests] == [0.0, 27.482]
    first = trace.requests[0]
    assert (first.prompt_tokens, first.completion_tokens) == (1100, 52)
    assert first.blocks == (46, 47)  # the last block is not full
    assert load_trace(str(path), 4.0, None).duration_s == pytest.approx(0.5)
    assert len(load_trace(str(path), None, 10.0).requests) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ("[]", "a JSON object"),
        (GOOD.replace("1100", "-1"), "input_length must be a whole number"),
        (GOOD.replace("1100", "1e99"), "input_length"),
        (GOOD.replace("27482", "NaN"), "timestamp must be at least 0"),
        (GOOD.replace("[46", '["x"'), "hash_ids must be a list"),
        (GOOD.replace("output_length", "output"), "'output_length' is missing"),
        (GOOD.replace("52", "null"), "line 2"),
    ],
)
def test_a_malformed_line_is_reported_by_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(TraceError, match="line 2") as caught:
        read_trace(path)
    assert message in str(caught.value)


HEADER = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"
)


def test_burstgpt_traces_are_read(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    rows = [
        "5,a,3,ChatGPT,472,18,490,Conversation log",
        "45,a,3,ChatGPT,600,230,830,Conversation log",
        "50,,3,GPT-4,0,0,0,Conversation log",  # failed
        "118,,3,GPT-4,417,276,693,API log",
    ]
    path.write_text("\n".join([HEADER, *rows]))
    first, second, third = read_trace(path).requests
    assert (first.prompt_tokens, first.completion_tokens, first.session) == (472, 18, "a")
    assert second.blocks[:7] == (*first.blocks, *first.answer_blocks)
    assert third.session is None
    assert not set(third.blocks) & set(second.blocks)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Timestamp,Model\n1,2\n", "line 1: the header has no Request tokens, Response tokens"),
        (HEADER + "\n5,a,3,ChatGPT,many,18,490,API log\n", "line 2"),
        (HEADER + "\n5,a\n", "line 2"),
        (HEADER + "\n", "no requests"),
    ],
)
def test_a_malformed_table_is_reported(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "burst.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_trace(path)


def test_an_unknown_trace_is_rejected_with_the_known_names() -> None:
    with pytest.raises(TraceError, match=r"neither a file nor one of conversation, .*bursty"):
        load_trace("nothing", None, None)
