from benchmarks.mixed import ALONE, METRICS, TOGETHER, make_report, percentiles_ms
from benchmarks.token_times import TokenTimes


def test_a_load_has_the_percentiles_of_what_it_measured() -> None:
    assert percentiles_ms(TokenTimes(ttft_s=[0.2], itl_s=[0.01, 0.03]), []) == {
        "stream_p99": 30.0,
        "stream_ttft_p99": 200.0,
    }
    assert percentiles_ms(TokenTimes(), [0.004, 0.005]) == {"classify_p99": 5.0}


def test_ratios_compare_together_with_alone_in_each_round() -> None:
    milliseconds = {(metric, ALONE): [10.0, 20.0] for metric in METRICS}
    milliseconds |= {(metric, TOGETHER): [15.0, 20.0] for metric in METRICS}
    report = make_report(milliseconds, "tandem up", ["autoscaling: a from 1 to 2 replicas"])
    assert report.keys["stream_p99_ratio"].rounds == (1.5, 1.0)
    assert report.keys["classify_p99_ratio"].rounds == (1.5, 1.0)
    assert "autoscaling: a from 1 to 2 replicas" in report.notes
