"""Quantiles estimated from histogram buckets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.metrics import quantile

BOUNDS = (0.1, 1.0, 10.0)


@pytest.mark.parametrize(
    ("counts", "share", "value"),
    [
        ([0, 0, 0, 0], 0.5, None),
        ([10, 0, 0, 0], 0.5, 0.05),
        ([0, 10, 0, 0], 1.0, 1.0),
        ([1, 1, 0, 0], 0.5, 0.1),
        ([0, 4, 0, 0], 0.25, 0.325),
        ([0, 0, 0, 3], 0.5, 10.0),
        ([9, 0, 0, 1], 0.99, 10.0),
    ],
)
def test_quantiles_are_interpolated_within_a_bucket(counts, share, value) -> None:
    assert quantile(BOUNDS, counts, share) == (value and pytest.approx(value))


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.floats(0.01, 1), st.floats(0.01, 1))
def test_quantiles_grow_with_the_share(counts, one, other) -> None:
    low, high = (quantile(BOUNDS, counts, share) for share in sorted((one, other)))
    if any(counts):
        assert 0 <= low <= high <= BOUNDS[-1]
    else:
        assert low is high is None
