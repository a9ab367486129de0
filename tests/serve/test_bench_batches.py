import json

from benchmarks.batches import ALONE, BATCH, LINES, METRICS, make_lines, make_report
from cluster.batches import parse_line


def test_ratios_compare_with_a_batch_and_without_in_each_round() -> None:
    milliseconds = {(metric, ALONE): [10.0, 20.0] for metric in METRICS}
    milliseconds |= {(metric, BATCH): [11.0, 20.0] for metric in METRICS}
    report = make_report(milliseconds, {"lines": [2.0, 4.0]}, "tandem up")
    assert report.keys["ttft_p99_ratio"].rounds == (1.1, 1.0)
    assert report.details["lines"].median == 3.0


def test_the_lines_are_valid_requests() -> None:
    lines = make_lines("m").splitlines()
    assert len(lines) == LINES
    assert json.loads(bytes(parse_line(lines[0]).body))["model"] == "m"
