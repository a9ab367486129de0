from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.rounds import Summary, interleave, percentile


def test_each_round_has_every_name_and_starts_with_another_one() -> None:
    order = list(interleave(["a", "b", "c"], 3))
    assert order == [
        (0, "a"), (0, "b"), (0, "c"),
        (1, "b"), (1, "c"), (1, "a"),
        (2, "c"), (2, "a"), (2, "b"),
    ]  # fmt: skip


@given(st.integers(1, 6), st.integers(1, 9))
def test_all_names_are_measured_equally_often(num_names: int, num_rounds: int) -> None:
    names = [str(number) for number in range(num_names)]
    order = list(interleave(names, num_rounds))
    assert sorted(order) == sorted((r, name) for r in range(num_rounds) for name in names)
    assert all(a[0] <= b[0] for a, b in pairwise(order))


def test_a_summary_has_median_and_range() -> None:
    summary = Summary((3.0, 1.0, 8.0))
    assert (summary.median, summary.low, summary.high) == (3.0, 1.0, 8.0)
    assert Summary((1.0, 2.0)).median == 1.5


def test_ratios_are_taken_within_each_round() -> None:
    # In the second round the machine is half as fast; the ratio stays the same.
    ours, theirs = Summary((100.0, 50.0, 110.0)), Summary((50.0, 25.0, 50.0))
    assert ours.over(theirs).rounds == (2.0, 2.0, 2.2)
    assert ours.minus(theirs).rounds == (50.0, 25.0, 60.0)
    with pytest.raises(ValueError, match="shorter"):
        ours.over(Summary((1.0,)))


def test_percentiles_are_observed_values() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert percentile(values, 50) == 50.0
    assert percentile(values, 99) == 99.0
    assert percentile(values, 100) == 100.0
    assert percentile([7.0], 99) == 7.0
