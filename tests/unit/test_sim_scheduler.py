from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import SimConfig
from cluster.engines.sim.adapters import AdapterSlots
from cluster.engines.sim.blocks import BlockPool, block_hashes
from cluster.engines.sim.scheduler import MAX_STEP_TOKENS, Request, Scheduler


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make(**knobs: float | int) -> tuple[Scheduler, Clock]:
    clock = Clock()
    return Scheduler(SimConfig.model_validate(knobs), clock), clock


def request(prompt: list[int], max_tokens: int) -> Request:
    return Request(prompt, max_tokens, lambda: 7)


def run(scheduler: Scheduler, clock: Clock, steps: int = 100_000) -> list[Request]:
    ended: list[Request] = []
    for _ in range(steps):
        step = scheduler.plan()
        if step is None:
            return ended
        clock.now_s += step.duration_s
        ended += scheduler.commit(step)
    raise AssertionError("the scheduler does not come to an end")


def test_times_follow_from_prefill_decode_and_batch() -> None:
    scheduler, clock = make(
        prefill_s_per_token=0.01, decode_s_per_token=0.1, batch_slowdown=0.5, block_size_tokens=4
    )
    alone = request([1] * 10, 3)
    scheduler.add(alone)
    run(scheduler, clock)
    assert alone.first_token_s == pytest.approx(0.1)
    assert alone.finished_s == pytest.approx(0.1 + 2 * 0.1)

    clock.now_s = 0.0
    pair = [request([2] * 10, 2), request([3] * 10, 2)]
    for one in pair:
        scheduler.add(one)
    run(scheduler, clock)
    # One step prefills both (20 tokens), the next decodes both; two running: half again as long.
    assert [one.first_token_s for one in pair] == pytest.approx([0.3, 0.3])
    assert [one.finished_s for one in pair] == pytest.approx([0.45, 0.45])


def test_a_known_prefix_is_not_computed_again() -> None:
    scheduler, clock = make(prefill_s_per_token=1.0, block_size_tokens=4)
    scheduler.add(request(list(range(1, 11)), 1))
    run(scheduler, clock)
    clock.now_s = 0.0
    again = request([*range(1, 11), 50], 1)
    scheduler.add(again)
    run(scheduler, clock)
    assert again.cached_tokens == 8
    assert again.first_token_s == pytest.approx(3.0)


def with_adapters(max_loras: int, **knobs: float | int) -> tuple[Scheduler, Clock]:
    clock = Clock()
    config = SimConfig.model_validate({"adapter_load_s": 5.0, "decode_s_per_token": 1.0, **knobs})
    return Scheduler(config, clock, adapters=AdapterSlots(max_loras)), clock


def asks_for(adapter: str, max_tokens: int = 1) -> Request:
    return Request([1, 2, 3, 4, 5], max_tokens, lambda: 7, adapter=adapter)


def test_an_adapter_is_loaded_once_and_the_one_used_longest_ago_makes_room() -> None:
    scheduler, clock = with_adapters(2)
    times = []
    for adapter in ("a", "a", "", "b", "a", "c", "a", "b"):
        before = clock.now_s
        scheduler.add(asks_for(adapter))
        run(scheduler, clock)
        times.append(clock.now_s - before)
    assert times == [5.0, 0.0, 0.0, 5.0, 0.0, 5.0, 0.0, 5.0]


def test_who_finds_no_slot_waits_and_others_pass() -> None:
    scheduler, clock = with_adapters(1)
    first, second, plain = asks_for("a", 3), asks_for("b"), asks_for("")
    for one in (first, second, plain):
        scheduler.add(one)
    ended = run(scheduler, clock)
    assert ended == [plain, first, second]
    aborted = asks_for("a", 50)
    scheduler.add(aborted)
    scheduler.plan()
    scheduler.abort(aborted)
    scheduler.add(asks_for("c"))
    assert len(run(scheduler, clock)) == 1


def test_an_adapters_blocks_are_its_own() -> None:
    scheduler, clock = with_adapters(2, block_size_tokens=2)
    found = []
    for adapter in ("", "a", "b", "a", ""):
        scheduler.add(one := asks_for(adapter))
        run(scheduler, clock)
        found.append(one.cached_tokens)
    assert found == [0, 0, 0, 4, 4]


def test_a_prompt_is_shared_in_the_step_that_computes_it() -> None:
    scheduler, clock = make(prefill_s_per_token=1.0, block_size_tokens=4)
    pair = [request([5] * 9, 1), request([5] * 9, 1)]
    for one in pair:
        scheduler.add(one)
    run(scheduler, clock)
    assert [one.cached_tokens for one in pair] == [0, 8]
    assert [one.first_token_s for one in pair] == pytest.approx([10.0, 10.0])


def test_who_comes_while_a_long_prompt_is_computed_gets_all_of_it() -> None:
    scheduler, clock = make(prefill_s_per_token=1.0, block_size_tokens=4)
    prompt = [5] * (MAX_STEP_TOKENS + 9)
    pair = [request(list(prompt), 1), request(list(prompt), 1)]
    for one in pair:
        scheduler.add(one)
    step = scheduler.plan()
    assert step is not None
    assert scheduler.running == pair[:1]  # the step has no room for another one
    scheduler.commit(step)
    run(scheduler, clock)
    assert pair[1].cached_tokens == MAX_STEP_TOKENS + 8


def test_what_is_generated_is_shared_before_its_request_ends() -> None:
    scheduler, clock = make(block_size_tokens=4)
    first = request([1] * 4, 20)
    scheduler.add(first)
    for _ in range(10):
        step = scheduler.plan()
        assert step is not None
        scheduler.commit(step)
    following = request([*first.tokens, 2], 1)
    scheduler.add(following)
    run(scheduler, clock)
    assert following.cached_tokens == 12


def test_the_last_prompt_token_is_always_computed() -> None:
    scheduler, clock = make(prefill_s_per_token=1.0, block_size_tokens=4)
    for _ in range(2):
        one = request([5] * 8, 1)
        scheduler.add(one)
        run(scheduler, clock)
    assert one.cached_tokens == 4


def test_generated_text_is_a_prefix_for_the_next_turn() -> None:
    scheduler, clock = make(block_size_tokens=4)
    first = request([1] * 4, 9)
    scheduler.add(first)
    run(scheduler, clock)
    following = request([*first.tokens, 2, 2, 2], 1)
    scheduler.add(following)
    run(scheduler, clock)
    assert following.cached_tokens == 12  # the 13th token's keys were never computed


def test_a_long_prompt_takes_several_steps_and_lets_others_decode() -> None:
    scheduler, clock = make(decode_s_per_token=1.0)
    short = request([1] * 5, 4)
    scheduler.add(short)
    step = scheduler.plan()
    assert step is not None
    scheduler.commit(step)
    scheduler.add(request([2] * (2 * MAX_STEP_TOKENS + 1), 1))
    run(scheduler, clock)
    assert short.finished_s == pytest.approx(3.0)


def test_the_latest_is_preempted_when_blocks_run_out() -> None:
    scheduler, clock = make(num_kv_blocks=4, block_size_tokens=4)
    first, second = request([1] * 8, 8), request([2] * 8, 8)
    scheduler.add(first)
    scheduler.add(second)
    ended = run(scheduler, clock)
    assert [one.num_generated for one in ended] == [8, 8]
    assert ended == [first, second]
    assert first.num_preemptions == 0
    assert second.num_preemptions > 0


def test_what_can_never_fit_is_refused() -> None:
    scheduler, _ = make(num_kv_blocks=2, block_size_tokens=4)
    for prompt, max_tokens in (([1] * 8, 1), ([], 1), ([1], 0)):
        with pytest.raises(ValueError, match="request"):
            scheduler.add(request(prompt, max_tokens))


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
def test_every_request_ends_once_and_gives_its_blocks_back(
    plan: list[Arrival], num_blocks: int, max_num_seqs: int, block_size: int
) -> None:
    scheduler, _ = make(
        num_kv_blocks=num_blocks, max_num_seqs=max_num_seqs, block_size_tokens=block_size
    )
    requests = [request(list(a.prompt), a.max_tokens) for a in plan]
    ended: list[Request] = []
    aborted: set[int] = set()
    for now in range(1000):
        for one, arrival in zip(requests, plan, strict=True):
            if arrival.at_step == now:
                scheduler.add(one)
        step = scheduler.plan()
        for index, arrival in enumerate(plan):
            if arrival.aborted_after is not None and now == arrival.at_step + arrival.aborted_after:
                scheduler.abort(requests[index])
                aborted.add(index)
        if step is not None:
            ended += scheduler.commit(step)
        assert len(scheduler.running) <= max_num_seqs
        check_blocks(scheduler.blocks)
        if step is None and now > 25:
            break
    assert len(ended) == len(set(map(id, ended)))
    for index, one in enumerate(requests):
        if index in aborted and one.finished_s is None:
            assert one not in ended
        else:
            assert one in ended
            assert one.num_generated == one.max_tokens
            assert one.tokens[: one.num_prompt] == plan[index].prompt
    assert scheduler.blocks.used_tokens == 0
    assert scheduler.load() == type(scheduler.load())()


def check_blocks(pool: BlockPool) -> None:
    assert pool.private_tokens >= 0
    assert all(count > 0 for count in pool._held.values())
    assert not pool._held.keys() & pool._idle.keys()
    assert pool.used_tokens + len(pool._idle) * pool.block_tokens <= pool.capacity_tokens


def test_the_end_of_an_unused_prefix_is_evicted_first() -> None:
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


def test_what_was_computed_twice_is_kept_once() -> None:
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


def test_block_hashes_stand_for_all_tokens_before() -> None:
    one, other = block_hashes([1, 2, 3, 4, 9], 2), block_hashes([2, 1, 3, 4], 2)
    assert len(one) == len(other) == 2
    assert one[1] != other[1]
    assert one == block_hashes([1, 2, 3, 4], 2, one[:1])
