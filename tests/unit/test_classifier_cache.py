import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.engines.classifier.serving.cache import OVERHEAD_BYTES, CacheKey, ResultCache
from cluster.engines.classifier.serving.jobs import Encoded, EncodeOptions, Timings


def result(value: float, width: int = 4) -> Encoded:
    return Encoded(np.full((1, width), value, np.float32), [3], Timings(0, 0, 0))


def key(text: str) -> CacheKey:
    return CacheKey(b"", EncodeOptions("classify"), text)


SIZE = OVERHEAD_BYTES + 4 * 1 + 4 * 4


def test_the_least_recently_used_entry_is_evicted() -> None:
    cache = ResultCache(3 * SIZE)
    for text in "abc":
        cache.put(key(text), result(1))
    assert cache.get(key("a")) is not None
    cache.put(key("d"), result(2))
    assert [cache.get(key(text)) is not None for text in "abcd"] == [True, False, True, True]
    assert (cache.hits, cache.misses, cache.num_bytes) == (4, 1, 3 * SIZE)


def test_a_replaced_entry_counts_once() -> None:
    cache = ResultCache(3 * SIZE)
    for value in range(5):
        cache.put(key("a"), result(value))
    found = cache.get(key("a"))
    assert found is not None
    assert found.rows[0][0] == 4
    assert cache.num_bytes == SIZE


def test_too_large_results_are_not_cached() -> None:
    cache = ResultCache(SIZE)
    cache.put(key("a"), result(1))
    cache.put(key("b" * 1000), result(1))
    assert cache.get(key("a")) is not None
    assert cache.get(key("b" * 1000)) is None


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 300)), max_size=60))
def test_the_cache_stays_within_its_limit(puts: list[tuple[str, int]]) -> None:
    cache = ResultCache(5000)
    kept: dict[str, Encoded] = {}
    for text, width in puts:
        kept[text] = result(width, width)
        cache.put(key(text), kept[text])
        assert cache.num_bytes <= 5000
        assert cache.get(key(text)) is kept[text]
    for text, last in kept.items():
        assert cache.get(key(text)) in (None, last)
