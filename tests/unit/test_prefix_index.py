from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.routing import PrefixIndex
from cluster.routing.prefix_index import USED_STRIDE

NAMES = "abc"
CHAINS = tuple(tuple(range(start, start + 8)) for start in (0, 100, 200))
CHAINS = (*CHAINS, (*CHAINS[0][:4], 300, 301, 302, 303))


def test_stored_prefixes_are_found() -> None:
    index = PrefixIndex()
    index.add_stored("a", (1, 2, 3))
    index.add_stored("b", (1,))
    assert index.match((1, 2, 3, 4)) == {"a": 3, "b": 1}
    assert index.match((1, 5)) == {"a": 1, "b": 1}
    assert index.match((9,)) == index.match(()) == {}
    index.remove_stored("a", (3,))
    assert index.match((1, 2, 3, 4)) == {"a": 2, "b": 1}
    assert index.find_levels((1, 2)) == [(1, 0b110), (2, 0b010)]


def test_a_cleared_replica_holds_no_prefixes_and_may_return() -> None:
    index = PrefixIndex()
    for _ in range(2):
        index.add_stored("a", (1, 2))
        index.add_stored("b", (1, 2))
        index.clear("a")
        assert index.match((1, 2)) == {"b": 2}
        index.add_stored("a", (1,))
        assert index.match((1, 2)) == {"a": 1, "b": 2}
    index.clear("never seen")
    index.remove_stored("never seen", (1,))
    assert index.match((1, 2)) == {"a": 1, "b": 2}


def test_an_expectation_ends_with_time_or_by_the_replicas_report() -> None:
    index = PrefixIndex(expected_s=10.0)
    index.advance(100.0)
    index.expect("a", (1, 2))
    index.expect("b", (1, 2))
    index.advance(104.9)
    assert index.match((1, 2)) == {"a": 2, "b": 2}
    index.remove_stored("a", (2,))
    assert index.match((1, 2)) == {"a": 1, "b": 2}
    index.add_stored("b", (1,))
    index.advance(111.0)
    assert index.match((1, 2)) == {"b": 1}


def test_expectations_end_after_a_clock_jump() -> None:
    for jumped in (1e9, -1e9):
        index = PrefixIndex(expected_s=10.0)
        index.advance(100.0)
        index.expect("a", (1,))
        index.advance(jumped)
        index.advance(jumped + 6.0)
        assert index.match((1,)) == {}


def test_expectations_are_bounded() -> None:
    index = PrefixIndex()
    for start in range(0, 200_000, 100):
        index.expect("a", range(start, start + 100))
    assert index.num_expected < 60_000
    assert index.match((199_999,)) == {"a": 1}


def test_the_oldest_unused_entries_are_evicted() -> None:
    index = PrefixIndex(max_entries=100)
    index.add_stored("a", range(100))
    for start in range(100, 1000, 10):
        index.expect("a", (0, 1, 2))
        index.add_stored("a", range(start, start + 10))
    assert index.num_entries == 100
    assert index.match((0, 1, 2)) == {"a": 3}
    assert index.match((50,)) == {}
    assert index.match((999,)) == {"a": 1}


def test_bits_of_cleared_replicas_are_reused() -> None:
    index = PrefixIndex()
    index.add_stored("stays", range(5000))
    for number in range(2000):
        index.add_stored(f"replica-{number}", range(10))
        index.clear(f"replica-{number}")
    assert max(mask for _, mask in index.find_levels((1,))) == 0b10
    assert index.num_bits < 200


def test_a_missing_prefix_ends_the_match() -> None:
    index = PrefixIndex()
    index.add_stored("a", (1, 2, 4))
    index.add_stored("b", (1, 2, 3, 4))
    assert index.match((1, 2, 3, 4)) == {"a": 2, "b": 4}


def test_with_many_lengths_the_longest_matches_are_exact_and_others_approximate() -> None:
    index, prompt = PrefixIndex(), tuple(range(64))
    truth = {f"replica-{number}": number * 3 + 1 for number in range(21)}
    for name, count in truth.items():
        index.add_stored(name, prompt[:count])
    found = index.match(prompt)
    assert all(count - 4 < found[name] <= count for name, count in truth.items())
    assert found["replica-20"] == 61
    few = {name: truth[name] for name in ("replica-3", "replica-11")}
    for name in truth.keys() - few.keys():
        index.clear(name)
    assert index.match(prompt) == few


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("stored", "stored", "expect", "removed", "cleared", "advance")),
        st.sampled_from(NAMES),
        st.sampled_from(CHAINS),
        st.integers(1, 8),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(steps=STEPS, max_entries=st.sampled_from((4, 10, 2**20)))
def test_the_index_agrees_with_plain_sets_and_never_overstates(
    steps: list[tuple[str, str, tuple[int, ...], int]], max_entries: int
) -> None:
    """Exact as long as nothing was evicted."""
    index = PrefixIndex(max_entries, expected_s=10.0)
    stored: dict[str, set[int]] = defaultdict(set)
    expected: dict[str, set[int]] = defaultdict(set)
    for now, (step, name, chain, count) in enumerate(steps):
        if step == "stored":
            index.add_stored(name, chain[:count])
            stored[name].update(chain[:count])
        elif step == "expect":
            index.expect(name, chain[:count])
            expected[name].update(chain[:count])
        elif step == "removed":  # like engines, from the end of a chain
            gone = set().union(*(each[count - 1 :] for each in CHAINS if each[0] == chain[0]))
            index.remove_stored(name, gone)
            stored[name] -= gone
            expected[name] -= gone
        elif step == "cleared":
            index.clear(name)
            stored[name].clear()
            expected[name].clear()
        else:
            index.advance(100.0 * now)
            expected.clear()
        for asked in CHAINS:
            found = index.match(asked)
            for each in NAMES:
                known = stored[each] | expected[each]
                truth = next((at for at, h in enumerate(asked) if h not in known), len(asked))
                counts = (found.get(each, 0), index.count(each, asked))
                assert max(counts) <= truth
                if max_entries > 100:
                    assert counts == (truth, truth)
    assert index.num_entries <= max_entries


def test_expectations_of_a_prompt_that_returns_are_renewed() -> None:
    index = PrefixIndex(expected_s=10.0)
    index.advance(0.0)
    index.expect("a", (1, 2, 3))
    for now_s in (5.0, 10.0, 15.0, 20.0):
        index.advance(now_s)
        held = index.count("a", (1, 2, 3))
        assert held == 3
        index.expect("a", (1, 2, 3), held)


def test_a_count_after_a_lookup_of_the_same_prompt_sees_later_events() -> None:
    index, prompt = PrefixIndex(), (1, 2, 3)
    index.add_stored("a", prompt)
    assert index.match(prompt) == {"a": 3}
    index.remove_stored("a", (2, 3))
    assert index.count("a", prompt) == 1
    assert index.match(prompt) == {"a": 1}
    index.add_stored("b", prompt)
    assert (index.count("a", prompt), index.count("b", prompt)) == (1, 3)
    assert index.match(prompt) == {"a": 1, "b": 3}
    index.expect("a", prompt, 1)
    assert index.count("a", prompt) == 3
    assert index.match(prompt) == {"a": 3, "b": 3}
    index.clear("b")
    index.add_stored("c", (1,))
    assert [index.count(each, prompt) for each in "abc"] == [3, 0, 1]


def test_a_count_is_exact_where_levels_are_approximate() -> None:
    index, prompt = PrefixIndex(), tuple(range(64))
    for number in range(21):
        index.add_stored(f"replica-{number}", prompt[: number * 3 + 1])
    index.find_levels(prompt)
    counts = [index.count(f"replica-{number}", prompt) for number in range(21)]
    assert counts == [number * 3 + 1 for number in range(21)]


def test_replicas_that_expect_the_same_prefixes_are_independent() -> None:
    index = PrefixIndex()
    index.expect("a", (1, 2, 3))
    index.expect("b", (1, 2))
    index.expect("c", (3,))
    index.remove_stored("a", (2,))
    assert index.match((1, 2, 3)) == {"a": 1, "b": 2}
    assert index.match((3,)) == {"a": 1, "c": 1}


def test_held_prefixes_of_a_frequent_prompt_count_as_used() -> None:
    index = PrefixIndex(max_entries=64)
    frequent = tuple(range(32))
    index.add_stored("a", frequent)
    for start in range(1000, 2000, 8):
        for _ in range(USED_STRIDE):
            index.expect("a", frequent, index.count("a", frequent))
        index.add_stored("a", range(start, start + 8))
    assert index.count("a", frequent) == 32
