"""Keys of ``bench classify``. In tests/serve because the package imports torch."""

import pytest

from benchmarks.classify import IN_PROCESS_MEASUREMENTS, LOADS, report

KEYS = {
    "ratio_vs_kernel", "ratio_vs_kernel_single", "ratio_vs_pipeline", "ratio_vs_infinity",
    "ratio_vs_infinity_single", "ratio_vs_vllm", "single_ms_p50", "single_ms_p99",
    "padding_waste", "accuracy_delta", "single_ratio_vs_openvino_bf16",
    "cpu_ratio_vs_kernel_single",
}  # fmt: skip


def make_results() -> report.Results:
    """Return two rounds of every measurement; in the second, the machine is half as fast."""
    rounds = {("in process", name): [1000.0, 500.0] for name in IN_PROCESS_MEASUREMENTS}
    for server, rate in (("tandem", 900.0), ("infinity-bf16", 300.0), ("infinity-fp32", 450.0),
                         ("vllm", 100.0)):  # fmt: skip
        for load in LOADS:
            rounds[server, load] = [rate, rate / 2]
            rounds[server, f"{load} p50"] = [4.0, 8.0]
            rounds[server, f"{load} p99"] = [6.0, 12.0]
            rounds[server, f"{load} CPU"] = [3.0, 6.0]
    rounds["in process", "bf16 accuracy"] = [0.91, 0.91]
    rounds["in process", "fp32 accuracy"] = [0.92, 0.92]
    rounds["in process", "padding waste"] = [0.01, 0.01]
    return rounds


def test_every_key_exists_and_ratios_are_taken_within_a_round() -> None:
    made = report.make_report(make_results(), num_tokens=27)
    assert made.keys.keys() >= KEYS
    assert made.keys["ratio_vs_kernel"].rounds == (0.9, 0.9)
    assert made.keys["accuracy_delta"].rounds == pytest.approx((-0.01, -0.01))
    assert made.keys["single_ms_p99"].rounds == (6.0, 12.0)
    assert made.goals.keys() <= made.keys.keys()


def test_the_faster_dtype_of_infinity_counts() -> None:
    rounds = make_results()
    assert report.make_report(rounds, 27).keys["ratio_vs_infinity"].rounds == (2.0, 2.0)
    rounds["infinity-bf16", "1x64"] = [900.0, 450.0]
    assert report.make_report(rounds, 27).keys["ratio_vs_infinity_single"].rounds == (1.0, 1.0)


def test_the_fastest_variant_of_vllm_counts() -> None:
    rounds = make_results()
    rounds["vllm-compiled", "32x8"] = [600.0, 300.0]
    assert report.make_report(rounds, 27).keys["ratio_vs_vllm"].rounds == (1.5, 1.5)


def test_ratios_show_both_quantities() -> None:
    made = report.make_report(make_results(), 27, {"vllm": "vllm serve"})
    assert made.values["ratio_vs_kernel"]["ours"].rounds == (900.0, 450.0)
    assert made.values["ratio_vs_kernel"]["tuned"].rounds == (1000.0, 500.0)
    assert made.commands == {"vllm": "vllm serve"}


def test_missing_measurements_have_no_key() -> None:
    rounds = {name: numbers for name, numbers in make_results().items() if name[0] == "tandem"}
    assert report.make_report(rounds, 27).keys.keys() == {
        "single_ms_p50",
        "single_ms_p99",
        "cpu_s_per_1000_texts",
        "cpu_s_per_1000_texts_single",
    }
