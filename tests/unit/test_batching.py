import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.batching import Batch, Batcher, group_by_length

BUDGET = 64
requests = st.lists(
    st.tuples(
        st.sampled_from(["classify", "embed"]),
        st.lists(st.integers(1, 100), min_size=1, max_size=30),
    ),
    max_size=20,
)


def drain(batcher: Batcher[int]) -> list[Batch[int]]:
    batches = []
    while batch := batcher.cut_batch():
        batches.append(batch)
    return batches


@given(requests, st.integers(1, 5))
def test_every_text_is_in_one_batch_within_the_budget(reqs, lookahead):
    batcher = Batcher[int](BUDGET, lookahead)
    for key, (task, lengths) in enumerate(reqs):
        batcher.add_request(key, task, lengths)
    assert batcher.waiting_tokens == sum(sum(lengths) for _, lengths in reqs)
    seen = []
    for batch in drain(batcher):
        lengths = [item.length for item in batch.items]
        assert lengths == sorted(lengths)
        assert batch.num_tokens == sum(lengths)
        assert batch.num_tokens <= BUDGET or len(lengths) == 1
        assert {reqs[item.key][0] for item in batch.items} == {batch.task}
        seen += [(item.key, item.index, item.length) for item in batch.items]
    wanted = [(k, i, n) for k, (_, lengths) in enumerate(reqs) for i, n in enumerate(lengths)]
    assert sorted(seen) == wanted
    assert (batcher.waiting_tokens, batcher.waiting_texts, batcher.waiting_requests) == (0, 0, 0)
    assert batcher.skipped_texts == 0


@given(requests, st.data())
def test_cancelled_texts_are_skipped_and_counted(reqs, data):
    batcher = Batcher[int](BUDGET)
    for key, (task, lengths) in enumerate(reqs):
        batcher.add_request(key, task, lengths)
    first = batcher.cut_batch()
    gone = data.draw(st.sets(st.sampled_from(range(len(reqs))))) if reqs else set()
    skipped = sum(batcher.cancel_request(key) for key in gone)
    rest = drain(batcher)
    assert all(item.key not in gone for batch in rest for item in batch.items)
    served = sum(len(batch.items) for batch in [first, *rest] if batch)
    assert served + skipped == sum(len(lengths) for _, lengths in reqs)
    assert batcher.skipped_texts == skipped
    assert (batcher.waiting_tokens, batcher.waiting_texts, batcher.waiting_requests) == (0, 0, 0)


@given(st.lists(st.integers(1, 32), min_size=1, max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_no_text_starves_under_an_endless_flood(old, random):
    # Each batch has at least half a budget, so virtual time advances by at least 1 (32 tokens
    # over 32 waiting requests). After sum(old) batches no newer request is before the old one,
    # and each batch contains its first text.
    batcher = Batcher[int](BUDGET)
    batcher.add_request(0, "classify", old)
    key, left, cuts = 0, len(old), 0
    while left:
        while batcher.waiting_requests < 32:
            key += 1
            batcher.add_request(key, "classify", [random.choice([1, 2, 30, 31, 32])])
        batch = batcher.cut_batch()
        assert batch
        cuts += 1
        left -= sum(item.key == 0 for item in batch.items)
    assert cuts <= sum(old) + 64


def test_a_single_text_overtakes_a_large_request():
    batcher = Batcher[str](BUDGET)
    batcher.add_request("large", "classify", [16] * 1000)
    for _ in range(20):
        batcher.cut_batch()
    for length in (3, 16, 60):
        batcher.add_request(f"single {length}", "classify", [length])
    keys = {item.key for _ in range(4) if (batch := batcher.cut_batch()) for item in batch.items}
    assert {"single 3", "single 16", "single 60"} <= keys


def test_a_large_request_keeps_its_share_among_many_singles():
    # 64 requests wait at any moment, so the fair share of 64 * 50 texts is 50; accept half to
    # double of it.
    batcher = Batcher[int](BUDGET, lookahead=1)
    batcher.add_request(0, "classify", [16] * 100)
    number, served, large = 0, 0, 0
    while served < 64 * 50:
        while batcher.waiting_requests < 64:
            number += 1
            batcher.add_request(number, "classify", [16])
        batch = batcher.cut_batch()
        assert batch
        served += len(batch.items)
        large += sum(item.key == 0 for item in batch.items)
    assert 25 <= large <= 100


def test_requests_that_fit_a_batch_finish_in_order_of_arrival():
    batcher = Batcher[str](BUDGET, lookahead=1)
    for key in "abcd":
        batcher.add_request(key, "classify", [4] * (BUDGET // 4))
    assert [{item.key for item in batch.items} for batch in drain(batcher)] == [*map(set, "abcd")]


def test_a_small_request_overtakes_larger_earlier_ones():
    batcher = Batcher[str](BUDGET, lookahead=1)
    for key in "abcd":
        batcher.add_request(key, "classify", [4] * (BUDGET // 4))
    batcher.cut_batch()
    batcher.add_request("small", "classify", [4])
    batch = batcher.cut_batch()
    assert batch
    assert "small" in {item.key for item in batch.items}


def test_slightly_shorter_later_texts_do_not_overtake():
    batcher = Batcher[str](BUDGET, lookahead=1)
    batcher.add_request("long", "classify", [BUDGET // 4 - 1])
    for number in range(BUDGET):
        batcher.add_request(f"short {number}", "classify", [1])
    batch = batcher.cut_batch()
    assert batch
    assert "long" in {item.key for item in batch.items}


def test_simultaneous_large_requests_share_evenly():
    batcher = Batcher[str](BUDGET, lookahead=1)
    for key in "abcd":
        batcher.add_request(key, "classify", [4] * 100)
    counts = dict.fromkeys("abcd", 0)
    for _ in range(20):
        batch = batcher.cut_batch()
        assert batch
        for item in batch.items:
            counts[item.key] += 1
    assert set(counts.values()) == {20 * BUDGET // 4 // 4}


@given(st.integers(1, 4 * BUDGET), st.integers(1, 4 * BUDGET))
def test_shares_do_not_depend_on_the_lengths_of_texts(one, other):
    # Neither may be ahead by more than a portion and a batch, each up to a budget and one text.
    batcher = Batcher[int](BUDGET, lookahead=1)
    batcher.add_request(0, "classify", [one] * (40 * BUDGET // one + 1))
    batcher.add_request(1, "classify", [other] * (40 * BUDGET // other + 1))
    served = [0, 0]
    while batcher.waiting_requests == 2:
        batch = batcher.cut_batch()
        assert batch
        for item in batch.items:
            served[item.key] += item.length
        assert abs(served[0] - served[1]) <= 2 * (2 * BUDGET + max(one, other))


def test_texts_of_similar_length_are_batched_together():
    batcher = Batcher[int](BUDGET)
    for key in range(16):
        batcher.add_request(key, "classify", [3 if key % 2 else 8])
    first, second = batcher.cut_batch(), batcher.cut_batch()
    assert first
    assert second
    assert {item.length for item in first.items} == {8}
    assert {item.length for item in second.items} == {3}


def test_keys_are_unique_and_unknown_keys_cancel_nothing():
    batcher = Batcher[str](BUDGET)
    batcher.add_request("a", "classify", [1])
    with pytest.raises(ValueError, match="already waiting"):
        batcher.add_request("a", "classify", [1])
    assert batcher.cancel_request("b") == 0
    assert batcher.cancel_request("a") == 1
    assert batcher.cut_batch() is None
    batcher.add_request("a", "classify", [1])
    assert batcher.cut_batch()


@given(st.lists(st.integers(1, 512)).map(sorted), st.floats(0, 1))
def test_groups_cover_all_lengths_within_the_allowed_padding(lengths, max_padding):
    groups = group_by_length(lengths, max_padding)
    assert [n for group in groups for n in lengths[group]] == lengths
    for group in groups:
        run = lengths[group]
        cells = len(run) * run[-1]
        assert cells - sum(run) <= max_padding * cells + 1e-9


def test_groups_of_equal_length_by_default():
    assert group_by_length([3, 3, 4, 9, 9]) == [slice(0, 2), slice(2, 3), slice(3, 5)]
    assert group_by_length([]) == []
