"""The event-driven engine model against the simulated engine's step-by-step scheduler."""

import random

import pytest

from cluster.config import SimConfig
from cluster.engines.sim.scheduler import Scheduler, SimRequest
from cluster.simulation.engine_model import EngineModel, Sequence
from cluster.simulation.requests import TraceRequest

BLOCK = 128
GPU_LIKE = {"prefill_s_per_token": 1e-4, "decode_s_per_token": 0.01, "batch_slowdown": 0.02}


class EventRecorder:
    """Records the engine's events."""

    def __init__(self) -> None:
        self.first: dict[Sequence, float] = {}
        self.end: dict[Sequence, float] = {}
        self.cached: set[int] = set()
        self.num_removed = 0

    def first_token(self, sequence: Sequence, now_s: float) -> None:
        assert sequence not in self.first
        self.first[sequence] = now_s

    def ended(self, sequence: Sequence, now_s: float) -> None:
        assert sequence not in self.end
        self.end[sequence] = now_s


def requests(seed: int, rate: float, num: int = 400) -> list[TraceRequest]:
    """Return prompts of many lengths, half of which share prefixes."""
    drawn, now_s, made = random.Random(seed), 0.0, []
    for number in range(num):
        now_s += drawn.expovariate(rate)
        common = drawn.randint(0, 12) if drawn.random() < 0.5 else 0
        family = drawn.randint(1, 6)
        own = min(60, int(drawn.lognormvariate(1.0, 1.0)))
        blocks = tuple(family * 1000 + at for at in range(common))
        blocks += tuple(10_000 + number * 100 + at for at in range(own))
        prompt = len(blocks) * BLOCK + drawn.randint(1, BLOCK - 1)
        made.append(TraceRequest(now_s, prompt, 1 + int(drawn.expovariate(1 / 80)), blocks))
    return made


def jump(
    config: SimConfig, trace: list[TraceRequest]
) -> tuple[EngineModel, list[Sequence], EventRecorder]:
    ends = EventRecorder()
    engine = EngineModel(config, BLOCK, ends.first_token, ends.ended)
    sequences = [Sequence(request) for request in trace]
    for sequence in sequences:
        commit(engine, ends, until_s=sequence.request.arrival_s)
        engine.add(sequence, sequence.request.arrival_s)
    commit(engine, ends, until_s=1e9)
    return engine, sequences, ends


def commit(engine: EngineModel, ends: EventRecorder, until_s: float) -> None:
    while engine.due_s <= until_s:
        engine.commit()
        stored, removed = engine.take_block_changes()
        ends.cached |= set(stored)
        ends.cached -= set(removed)
        ends.num_removed += len(removed)


def step(config: SimConfig, trace: list[TraceRequest]) -> tuple[list[SimRequest], list[float]]:
    """Run a trace on the simulated engine's scheduler; also return all gaps between tokens."""
    now = [0.0]
    gaps: list[float] = []
    scheduler = Scheduler(config, lambda: now[0])
    last: dict[int, float] = {}
    made: list[SimRequest] = []

    def pass_time(until: float) -> None:
        while (planned := scheduler.plan()) is not None:
            now[0] += planned.duration_s
            for one in planned.samples:
                if id(one) in last:
                    gaps.append(now[0] - last[id(one)])
                last[id(one)] = now[0]
            scheduler.commit(planned)
            if now[0] >= until:
                return
        now[0] = max(now[0], until) if until < 1e9 else now[0]

    for number, request in enumerate(trace):
        if now[0] < request.arrival_s:
            pass_time(request.arrival_s)
        tokens = [block for block in request.blocks for _ in range(BLOCK)]
        tokens += [-number - 1] * (request.prompt_tokens - len(tokens))
        made.append(SimRequest(tokens, request.completion_tokens, lambda: 7))
        scheduler.add_request(made[-1])
        made[-1].arrived_s = request.arrival_s
    pass_time(1e9)
    return made, gaps


def percentile(values: list[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


@pytest.mark.parametrize(
    ("knobs", "rate"),
    [
        (GPU_LIKE | {"num_kv_blocks": 8192}, 2.0),
        (GPU_LIKE | {"num_kv_blocks": 8192}, 5.0),
        (GPU_LIKE | {"num_kv_blocks": 2048, "max_num_seqs": 16}, 3.0),
        (GPU_LIKE | {"num_kv_blocks": 600}, 2.0),  # requests are preempted
    ],
)
def test_latencies_agree_with_the_scheduler(knobs: dict[str, float], rate: float) -> None:
    config = SimConfig.model_validate(knobs)
    trace = requests(1, rate)
    engine, sequences, ends = jump(config, trace)
    exact, gaps = step(config, trace)
    exact_ttft = [one.first_token_s - one.arrived_s for one in exact if one.first_token_s]
    exact_e2e = [one.finished_s - one.arrived_s for one in exact if one.finished_s]
    ttft = [ends.first[one] - one.request.arrival_s for one in sequences]
    e2e = [ends.end[one] - one.request.arrival_s for one in sequences]
    for percent in (50, 90, 99):
        assert percentile(ttft, percent) == pytest.approx(percentile(exact_ttft, percent), rel=0.15)
        assert percentile(e2e, percent) == pytest.approx(percentile(exact_e2e, percent), rel=0.15)
        assert engine.itl_s.percentile(percent) == pytest.approx(
            percentile(gaps, percent), rel=0.15
        )
    cached = sum(one.cached_tokens or 0 for one in sequences)
    assert cached == pytest.approx(sum(one.cached_tokens for one in exact), rel=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_no_memory_is_held_after_all_requests_have_ended(seed: int) -> None:
    config = SimConfig.model_validate(GPU_LIKE | {"num_kv_blocks": 600, "max_num_seqs": 8})
    engine, sequences, ends = jump(config, requests(seed, 4.0))
    assert len(ends.first) == len(ends.end) == len(sequences)
    assert engine.cache.used_tokens == 0
    assert not engine.pending_blocks
    assert engine.load.running == engine.load.waiting == 0
    tokens = sum(one.request.completion_tokens for one in sequences)
    assert engine.itl_s.weight == tokens - len(sequences)


def test_reported_block_changes_match_the_cache() -> None:
    config = SimConfig.model_validate(GPU_LIKE | {"num_kv_blocks": 1200})
    trace = requests(3, 3.0)
    engine, _, ends = jump(config, trace)
    blocks = {block for request in trace for block in request.blocks}
    assert {block for block in blocks if engine.cache.count_cached((block,))} == ends.cached
    assert ends.num_removed


def test_simultaneous_equal_prompts_are_computed_once() -> None:
    prompt = tuple(range(20))
    trace = [TraceRequest(at / 1000, 20 * BLOCK + 5, 2, prompt) for at in range(5)]
    config = SimConfig.model_validate(GPU_LIKE)
    _, sequences, _ = jump(config, trace)
    exact, _ = step(config, trace)
    # The first takes two steps; the others arrive before those have ended.
    assert [one.cached_tokens for one in sequences] == [0] + 4 * [20 * BLOCK]
    assert [one.cached_tokens for one in exact] == [0] + 4 * [20 * BLOCK]


def test_generated_tokens_of_a_preempted_request_stay_cached() -> None:
    knobs = {"prefill_s_per_token": 0.01, "decode_s_per_token": 0.01, "num_kv_blocks": 40}
    config = SimConfig.model_validate(knobs)
    trace = [
        TraceRequest(
            0.0, 2 * BLOCK, 5 * BLOCK, (first, first + 1), tuple(range(first + 2, first + 6))
        )
        for first in (10, 20)
    ]
    _, sequences, ends = jump(config, trace)
    exact, _ = step(config, trace)
    assert sum(one.num_preemptions for one in exact) == 1
    for one, same in zip(sequences, exact, strict=True):
        # A trace's block is larger than an engine's, so up to one block is computed again.
        assert ends.end[one] == pytest.approx(same.finished_s, abs=(BLOCK + 1) * 0.01)


def test_an_instant_engine_needs_no_time() -> None:
    _, sequences, ends = jump(SimConfig(), requests(0, 1.0, num=20))
    assert all(ends.end[one] == one.request.arrival_s for one in sequences)


def test_a_request_larger_than_the_kv_cache_is_rejected() -> None:
    config, ends = SimConfig(num_kv_blocks=4, block_size_tokens=32), EventRecorder()
    engine = EngineModel(config, BLOCK, ends.first_token, ends.ended)
    with pytest.raises(ValueError, match="a request may hold at most 96 tokens"):
        engine.add(Sequence(TraceRequest(0.0, 100, 28)), 0.0)
