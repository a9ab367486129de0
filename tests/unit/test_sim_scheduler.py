"""Scheduling and KV blocks of the simulated engine, on a simulated clock."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import SimConfig
from cluster.engines.sim.adapters import AdapterSlots
from cluster.engines.sim.blocks import BlockPool, block_hashes
from cluster.engines.sim.scheduler import MAX_STEP_TOKENS, Scheduler, SimRequest
from cluster.load import Load


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make_scheduler(**sim: float | int) -> tuple[Scheduler, Clock]:
    clock = Clock()
    return Scheduler(SimConfig.model_validate(sim), clock), clock


def request(prompt: list[int], max_tokens: int) -> SimRequest:
    return SimRequest(prompt, max_tokens, lambda: 7)


def run(scheduler: Scheduler, clock: Clock, steps: int = 100_000) -> list[SimRequest]:
    finished: list[SimRequest] = []
    for _ in range(steps):
        step = scheduler.plan()
        if step is None:
            return finished
        clock.now_s += step.duration_s
        finished += scheduler.commit(step)
    raise AssertionError(f"still busy after {steps} steps")


def test_durations_follow_from_prefill_decode_and_batch_size() -> None:
    scheduler, clock = make_scheduler(
        prefill_s_per_token=0.01, decode_s_per_token=0.1, batch_slowdown=0.5, block_size_tokens=4
    )
    alone = request([1] * 10, 3)
    scheduler.add_request(alone)
    run(scheduler, clock)
    assert alone.first_token_s == pytest.approx(0.1)
    assert alone.finished_s == pytest.approx(0.1 + 2 * 0.1)

    clock.now_s = 0.0
    pair = [request([2] * 10, 2), request([3] * 10, 2)]
    for one in pair:
        scheduler.add_request(one)
    run(scheduler, clock)
    # One step prefills both (20 tokens), the next decodes both. Two running requests: 1.5 times as
    # long.
    assert [one.first_token_s for one in pair] == pytest.approx([0.3, 0.3])
    assert [one.finished_s for one in pair] == pytest.approx([0.45, 0.45])


def test_a_cached_prefix_is_not_computed() -> None:
    scheduler, clock = make_scheduler(prefill_s_per_token=1.0, block_size_tokens=4)
    scheduler.add_request(request(list(range(1, 11)), 1))
    run(scheduler, clock)
    clock.now_s = 0.0
    again = request([*range(1, 11), 50], 1)
    scheduler.add_request(again)
    run(scheduler, clock)
    assert again.cached_tokens == 8
    assert again.first_token_s == pytest.approx(3.0)


def make_scheduler_with_adapters(max_loras: int, **sim: float | int) -> tuple[Scheduler, Clock]:
    clock = Clock()
    config = SimConfig.model_validate({"adapter_load_s": 5.0, "decode_s_per_token": 1.0, **sim})
    return Scheduler(config, clock, adapters=AdapterSlots(max_loras)), clock


def adapter_request(adapter: str, max_tokens: int = 1) -> SimRequest:
    return SimRequest([1, 2, 3, 4, 5], max_tokens, lambda: 7, adapter=adapter)


def test_the_least_recently_used_adapter_is_evicted() -> None:
    scheduler, clock = make_scheduler_with_adapters(2)
    times = []
    for adapter in ("a", "a", "", "b", "a", "c", "a", "b"):
        before = clock.now_s
        scheduler.add_request(adapter_request(adapter))
        run(scheduler, clock)
        times.append(clock.now_s - before)
    assert times == [5.0, 0.0, 0.0, 5.0, 0.0, 5.0, 0.0, 5.0]


def test_requests_without_a_slot_wait_and_are_overtaken() -> None:
    scheduler, clock = make_scheduler_with_adapters(1)
    first, second, plain = adapter_request("a", 3), adapter_request("b"), adapter_request("")
    for one in (first, second, plain):
        scheduler.add_request(one)
    finished = run(scheduler, clock)
    assert finished == [plain, first, second]
    aborted = adapter_request("a", 50)
    scheduler.add_request(aborted)
    scheduler.plan()
    scheduler.abort(aborted)
    scheduler.add_request(adapter_request("c"))
    assert len(run(scheduler, clock)) == 1


def test_blocks_of_adapters_are_separate() -> None:
    scheduler, clock = make_scheduler_with_adapters(2, block_size_tokens=2)
    found = []
    for adapter in ("", "a", "b", "a", ""):
        scheduler.add_request(one := adapter_request(adapter))
        run(scheduler, clock)
        found.append(one.cached_tokens)
    assert found == [0, 0, 0, 4, 4]


def test_a_prompt_is_shared_within_the_step_that_computes_it() -> None:
    scheduler, clock = make_scheduler(prefill_s_per_token=1.0, block_size_tokens=4)
    pair = [request([5] * 9, 1), request([5] * 9, 1)]
    for one in pair:
        scheduler.add_request(one)
    run(scheduler, clock)
    assert [one.cached_tokens for one in pair] == [0, 8]
    assert [one.first_token_s for one in pair] == pytest.approx([10.0, 10.0])


def test_an_equal_prompt_waits_for_a_long_one_and_shares_all_of_it() -> None:
    scheduler, clock = make_scheduler(prefill_s_per_token=1.0, block_size_tokens=4)
    prompt = [5] * (MAX_STEP_TOKENS + 9)
    pair = [request(list(prompt), 1), request(list(prompt), 1)]
    for one in pair:
        scheduler.add_request(one)
    step = scheduler.plan()
    assert step is not None
    assert scheduler.running == pair[:1]  # the step has no room for a second prompt
    scheduler.commit(step)
    run(scheduler, clock)
    assert pair[1].cached_tokens == MAX_STEP_TOKENS + 8


def test_generated_blocks_are_shared_before_the_request_ends() -> None:
    scheduler, clock = make_scheduler(block_size_tokens=4)
    first = request([1] * 4, 20)
    scheduler.add_request(first)
    for _ in range(10):
        step = scheduler.plan()
        assert step is not None
        scheduler.commit(step)
    following = request([*first.tokens, 2], 1)
    scheduler.add_request(following)
    run(scheduler, clock)
    assert following.cached_tokens == 12


def test_the_last_prompt_token_is_always_computed() -> None:
    scheduler, clock = make_scheduler(prefill_s_per_token=1.0, block_size_tokens=4)
    for _ in range(2):
        one = request([5] * 8, 1)
        scheduler.add_request(one)
        run(scheduler, clock)
    assert one.cached_tokens == 4


def test_generated_text_is_a_cached_prefix_of_the_next_turn() -> None:
    scheduler, clock = make_scheduler(block_size_tokens=4)
    first = request([1] * 4, 9)
    scheduler.add_request(first)
    run(scheduler, clock)
    following = request([*first.tokens, 2, 2, 2], 1)
    scheduler.add_request(following)
    run(scheduler, clock)
    assert following.cached_tokens == 12  # the KV of the 13th token was never computed


def test_a_long_prompt_is_chunked_and_others_decode_meanwhile() -> None:
    scheduler, clock = make_scheduler(decode_s_per_token=1.0)
    short = request([1] * 5, 4)
    scheduler.add_request(short)
    step = scheduler.plan()
    assert step is not None
    scheduler.commit(step)
    scheduler.add_request(request([2] * (2 * MAX_STEP_TOKENS + 1), 1))
    run(scheduler, clock)
    assert short.finished_s == pytest.approx(3.0)


def test_the_newest_request_is_preempted_when_blocks_run_out() -> None:
    scheduler, clock = make_scheduler(num_kv_blocks=4, block_size_tokens=4)
    first, second = request([1] * 8, 8), request([2] * 8, 8)
    scheduler.add_request(first)
    scheduler.add_request(second)
    finished = run(scheduler, clock)
    assert [one.num_generated for one in finished] == [8, 8]
    assert finished == [first, second]
    assert first.num_preemptions == 0
    assert second.num_preemptions > 0


def test_requests_that_can_never_fit_are_rejected() -> None:
    scheduler, _ = make_scheduler(num_kv_blocks=2, block_size_tokens=4)
    for prompt, max_tokens in (([1] * 8, 1), ([], 1), ([1], 0)):
        with pytest.raises(ValueError, match="request"):
            scheduler.add_request(request(prompt, max_tokens))


@dataclass(frozen=True)
class Arrival:
    prompt: list[int]
    max_tokens: int
    at_step: int
    aborted_after: int | None


arrivals = st.builds(
    Arrival,
    prompt=st.lists(st.integers(1, 2), min_size=1, max_size=14),
    max_tokens=st.integers(1, 10),
    at_step=st.integers(0, 12),
    aborted_after=st.none() | st.integers(0, 8),
)


@settings(deadline=None, max_examples=200)
@given(
    plan=st.lists(arrivals, max_size=10),
    num_blocks=st.integers(6, 20),
    max_num_seqs=st.integers(1, 5),
    block_size=st.integers(4, 5),
)
def test_every_request_ends_once_and_frees_its_blocks(
    plan: list[Arrival], num_blocks: int, max_num_seqs: int, block_size: int
) -> None:
    scheduler, _ = make_scheduler(
        num_kv_blocks=num_blocks, max_num_seqs=max_num_seqs, block_size_tokens=block_size
    )
    requests = [request(list(a.prompt), a.max_tokens) for a in plan]
    finished: list[SimRequest] = []
    aborted: set[int] = set()
    for now in range(1000):
        for one, arrival in zip(requests, plan, strict=True):
            if arrival.at_step == now:
                scheduler.add_request(one)
        step = scheduler.plan()
        for index, arrival in enumerate(plan):
            if arrival.aborted_after is not None and now == arrival.at_step + arrival.aborted_after:
                scheduler.abort(requests[index])
                aborted.add(index)
        if step is not None:
            finished += scheduler.commit(step)
        assert len(scheduler.running) <= max_num_seqs
        check_blocks(scheduler.blocks)
        if step is None and now > 25:
            break
    assert len(finished) == len(set(map(id, finished)))
    for index, one in enumerate(requests):
        if index in aborted and one.finished_s is None:
            assert one not in finished
        else:
            assert one in finished
            assert one.num_generated == one.max_tokens
            assert one.tokens[: one.num_prompt] == plan[index].prompt
    assert scheduler.blocks.used_tokens == 0
    assert scheduler.load() == Load(slots=max_num_seqs)


def check_blocks(pool: BlockPool) -> None:
    assert 0 <= pool.private_tokens <= pool.used_tokens
    assert pool.used_tokens + pool.idle_tokens <= pool.capacity_tokens


def test_an_idle_prefix_is_evicted_from_its_end() -> None:
    evicted: list[int] = []
    pool = BlockPool(6, 2, evicted.extend)
    hashes = block_hashes([1, 2, 3, 4, 5, 6], 2)
    assert pool.acquire((), 6)
    assert pool.share(hashes) == 3
    pool.release(hashes, 0)
    assert pool.acquire((), 2)
    assert pool.count_cached(hashes) == 2
    assert evicted == hashes[2:]
    assert not pool.acquire(hashes[:2], 2)
    assert pool.used_tokens == 2


def test_blocks_computed_twice_are_kept_once() -> None:
    pool = BlockPool(12, 2)
    one, other = block_hashes([1, 2, 3, 4], 2), block_hashes([1, 2, 3, 4, 5, 6], 2)
    assert pool.acquire((), 10)
    assert pool.share(one) == 2
    assert pool.share(other) == 1
    assert pool.used_tokens == 6
    pool.release(one, 0)
    assert pool.used_tokens == 6
    pool.release(other, 0)
    assert (pool.used_tokens, pool.count_cached(other)) == (0, 3)


def test_a_block_hash_covers_all_tokens_before() -> None:
    one, other = block_hashes([1, 2, 3, 4, 9], 2), block_hashes([2, 1, 3, 4], 2)
    assert len(one) == len(other) == 2
    assert one[1] != other[1]
    assert one == block_hashes([1, 2, 3, 4], 2, one[:1])
