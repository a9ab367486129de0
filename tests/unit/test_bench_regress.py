from benchmarks.regress import make_report


def test_a_key_is_slower_or_faster_only_if_every_round_agrees() -> None:
    before = {"slow": [1.0, 2.0], "fast": [1.0, 2.0], "noisy": [1.0, 2.0]}
    after = {"slow": [1.1, 2.2], "fast": [0.9, 1.8], "noisy": [1.5, 2.0]}
    report = make_report(before, after, ("main", "HEAD"))
    assert report.keys["slow_ratio"].rounds == (1.1, 1.1)
    verdicts = {row[0]: row[-1] for row in report.tables[0].rows}
    assert verdicts == {"slow": "slower", "fast": "faster", "noisy": "same"}


def test_a_probe_that_one_commit_cannot_run_is_named() -> None:
    report = make_report({"a": [1.0], "b": [1.0]}, {"a": [1.0]}, ("main", "HEAD"))
    assert list(report.keys) == ["a_ratio"]
    assert report.notes == ["Only one of the commits can run: b."]
