"""Keys and tables of ``bench classify``."""

from collections.abc import Iterable, Mapping

from benchmarks.report import CellValue, Report, Table
from benchmarks.rounds import Summary

OPENVINO = "openvino-bf16 single"
"""Measurement of OpenVINO's latency in process."""
Results = dict[tuple[str, str], list[float]]
"""Values of all rounds, by server and measurement."""

GOALS = {
    "ratio_vs_kernel": ">= 0.9",
    "ratio_vs_kernel_single": ">= 0.75",
    "cpu_ratio_vs_kernel_single": "<= 1.15",
    "ratio_vs_pipeline": ">= 6",
    "ratio_vs_infinity": ">= 2.4",
    "ratio_vs_infinity_single": ">= 3.5",
    "ratio_fifo_vs_transformers_bf16": ">= 2.2",
    "ratio_int8_vs_bf16": ">= 1.3",
    "single_ratio_vs_openvino_bf16": "<= 0.9",
    "padding_waste": "<= 0.02",
    "single_ms_p50": "<= 5",
    "single_in_process_ms": "<= 2.5",
    "replica_rss_mb": "<= 1200",
    "replica_pss_mb": "<= 900",
}
RATIOS = {
    "ratio_vs_kernel": (("tandem", "32x8"), ("in process", "bf16 sorted")),
    "ratio_vs_kernel_single": (("tandem", "1x64"), ("in process", "bf16 sorted")),
    "ratio_vs_pipeline": (("tandem", "32x8"), ("in process", "pipeline")),
    "ratio_split_vs_one": (("tandem-split", "32x8"), ("tandem", "32x8")),
    "ratio_split_vs_one_single": (("tandem-split", "1x64"), ("tandem", "1x64")),
    "ratio_job_vs_http": (("ray job", "32x8"), ("tandem", "32x8")),
    "ratio_fifo_vs_transformers_bf16": (
        ("in process", "bf16 fifo"),
        ("in process", "hf-bf16 fifo"),
    ),
    "ratio_fifo_vs_transformers_fp32": (
        ("in process", "fp32 fifo"),
        ("in process", "hf-fp32 fifo"),
    ),
    "ratio_int8_vs_bf16": (("in process", "int8 sorted"), ("in process", "bf16 sorted")),
    "single_ratio_vs_openvino_bf16": (("in process", "bf16 single"), ("in process", OPENVINO)),
    "cpu_ratio_vs_kernel": (("tandem", "32x8 CPU"), ("in process", "bf16 sorted CPU")),
    "cpu_ratio_vs_kernel_single": (("tandem", "1x64 CPU"), ("in process", "bf16 sorted CPU")),
}
"""Numerator and denominator of each ratio."""
PLAIN_KEYS = {
    "single_ms_p50": ("tandem", "1x1 p50"),
    "single_ms_p99": ("tandem", "1x1 p99"),
    "single_in_process_ms": ("in process", "bf16 single"),
    "single_openvino_ms": ("in process", OPENVINO),
    "cpu_s_per_1000_texts": ("tandem", "32x8 CPU"),
    "cpu_s_per_1000_texts_single": ("tandem", "1x64 CPU"),
    "replica_cpu_s_per_1000_texts_single": ("tandem", "1x64 replica CPU"),
    "kernel_cpu_s_per_1000_texts": ("in process", "bf16 sorted CPU"),
    "replica_rss_mb": ("tandem", "replica RSS"),
    "replica_pss_mb": ("tandem", "replica PSS"),
    "agreement_bf16": ("in process", "bf16 agreement"),
    "agreement_int8": ("in process", "int8 agreement"),
    "padding_waste": ("in process", "padding waste"),
}
INFINITY = ("infinity-bf16", "infinity-fp32", "infinity-compiled", "infinity-onnx")
VLLM = ("vllm", "vllm-compiled")
BEST_RATIOS = {
    "ratio_vs_infinity": (INFINITY, "32x8"),
    "ratio_vs_infinity_single": (INFINITY, "1x64"),
    "ratio_vs_vllm": (VLLM, "32x8"),
    "ratio_vs_vllm_single": (VLLM, "1x64"),
}
"""Peer's variants, of which the fastest counts, and load of each ratio to a peer's server."""


def make_report(
    results: Results, num_tokens: float, commands: Mapping[str, str] | None = None
) -> Report:
    """Return the report; ``num_tokens`` is the mean length of the texts."""
    summaries = {name: Summary(tuple(rounds)) for name, rounds in results.items() if rounds}
    keys = {
        key: summaries[ours].over(summaries[theirs])
        for key, (ours, theirs) in RATIOS.items()
        if ours in summaries and theirs in summaries
    }
    for key, (peers, load) in BEST_RATIOS.items():
        if (best := _best(summaries, peers, load)) and ("tandem", load) in summaries:
            keys[key] = summaries["tandem", load].over(best)
    accuracies = [summaries.get(("in process", f"{dtype} accuracy")) for dtype in ("bf16", "fp32")]
    if accuracies[0] and accuracies[1]:
        keys["accuracy_delta"] = accuracies[0].minus(accuracies[1])
    keys |= {key: summaries[name] for key, name in PLAIN_KEYS.items() if name in summaries}
    values = {
        key: {"ours": summaries[ours], "tuned": summaries[theirs]}
        for key, (ours, theirs) in RATIOS.items()
        if key in keys
    }
    return Report(
        keys=keys,
        goals={key: goal for key, goal in GOALS.items() if key in keys},
        values=values,
        commands=dict(commands or {}),
        tables=[
            table for kind in ("in process", "servers") if (table := _table(summaries, kind)).rows
        ],
        details={
            "classify": {
                f"{name}: {measurement}": rounds for (name, measurement), rounds in results.items()
            }
        },
        notes=[
            f"Texts have {num_tokens:.1f} tokens on average. AxB: A texts per request, "
            "B connections.",
            "tandem-split: one single-threaded replica per core, instead of one replica with all "
            "cores. Memory is that of the largest replica after its loads.",
            "The load is wrk with one thread, on the same cores as the servers. All servers were "
            "running, and one was measured at a time.",
        ],
    )


def _best(
    summaries: Mapping[tuple[str, str], Summary], peers: Iterable[str], load: str
) -> Summary | None:
    found = [summaries[name, load] for name in peers if (name, load) in summaries]
    return max(found, key=lambda summary: summary.median) if found else None


def _table(summaries: Mapping[tuple[str, str], Summary], kind: str) -> Table:
    rows: list[list[CellValue]] = [
        [measurement if kind == "in process" else f"{name}, {measurement}", value]
        for (name, measurement), value in summaries.items()
        if (name == "in process") == (kind == "in process")
    ]
    title = "texts/s (single, p50, p99: ms; CPU: s per 1,000 texts; RSS, PSS: MB)"
    return Table(f"{kind}: {title}", ("measurement", "median (lowest – highest)"), rows)
