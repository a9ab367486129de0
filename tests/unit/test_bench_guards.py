from benchmarks.guards import GUARDED, PATTERNS, PLAIN, make_pools, make_report
from cluster.config import parse


def test_the_difference_to_requests_without_guards_is_taken_in_each_round() -> None:
    keys = make_report(
        {PLAIN: [100.0, 50.0], "classifier": [103.0, 51.0], PATTERNS: [100.0, 54.0]}
    ).keys
    assert keys["classifier_added_ttft_p50_ms"].rounds == (3.0, 1.0)
    assert keys["patterns_added_ttft_p50_ms"].rounds == (0.0, 4.0)


def test_its_guards_are_valid() -> None:
    assert [guard.name for guard in parse(make_pools(GUARDED)).guards] == list(GUARDED)
