"""Hedges start after the 99th percentile of a size, and never exceed their share of the traffic."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.pools.hedger import MAX_BURST, MIN_KNOWN, Hedger


def test_the_delay_is_the_99th_percentile_of_requests_of_the_size() -> None:
    hedger = Hedger(0.02)
    for number in range(MIN_KNOWN):
        assert hedger.delay_s(16.0) is None
        hedger.observe(16.0, number / 1000)
        hedger.observe(5000.0, 1.0)
    assert hedger.delay_s(17.0) == 0.099
    assert hedger.delay_s(4097.0) == 1.0
    assert hedger.delay_s(100.0) is None


def test_recent_latencies_count() -> None:
    hedger = Hedger(0.02)
    for latency_s in [1.0] * 500 + [0.1] * 500:
        hedger.observe(16.0, latency_s)
    assert hedger.delay_s(16.0) == 0.1


@given(
    st.lists(st.tuples(st.floats(1, 1e6), st.booleans()), max_size=400),
    st.sampled_from([0.02, 0.1, 0.5]),
)
def test_the_budget_is_never_exceeded(requests: list[tuple[float, bool]], share: float) -> None:
    hedger = Hedger(share)
    num = hedges = 0
    tokens = hedged_tokens = 0.0
    for work_tokens, is_slow in requests:
        hedger.add_request(work_tokens)
        num, tokens = num + 1, tokens + work_tokens
        if is_slow and hedger.may_hedge(work_tokens):
            hedger.count_hedge(work_tokens)
            hedges, hedged_tokens = hedges + 1, hedged_tokens + work_tokens
        assert hedges <= share * num * (1 + 1e-9)
        assert hedged_tokens <= share * tokens * (1 + 1e-9)


def test_the_whole_budget_can_be_used_and_little_is_saved_up() -> None:
    hedger = Hedger(0.02)
    used = 0
    for _ in range(5000):
        hedger.add_request(16.0)
        if hedger.may_hedge(16.0):
            hedger.count_hedge(16.0)
            used += 1
    assert 98 <= used <= 100
    for _ in range(5000):
        hedger.add_request(16.0)
    used = 0
    while hedger.may_hedge(16.0):
        hedger.count_hedge(16.0)
        used += 1
    assert used <= MAX_BURST
