"""The table at the top of ``docs/performance.md``, from the committed results of benchmarks.

``bench NAME --json scripts/benchmarks/results/NAME.json`` writes a result; ``bench report`` writes
the table. A key that no result has is listed as not measured.
"""

import json
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import format_cell, format_machine
from benchmarks.rounds import Summary
from cluster.errors import TandemError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "scripts" / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- bench report: begin -->", "<!-- bench report: end -->"
HEADER = "| key | ours | tuned peer | peer's default | result | target | |"
NOT_MEASURED = "not measured"
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True, slots=True)
class Row:
    """One key of the table."""

    benchmark: str
    key: str
    target: str
    """Comparison and number, such as ``>= 1.0``."""
    value: str = ""
    """Name of the quantity that the key compares, in the values of a result; "" for none."""
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """Result file of one benchmark."""

    name: str
    """File name without ``.json``."""
    document: Mapping[str, Any]

    @property
    def machine(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.document["machine"]
        return found

    def summary(self, key: str) -> Summary | None:
        """Return the rounds of a key; None if it was not measured."""
        rounds = self.document["rounds"].get(key)
        return Summary(tuple(rounds)) if rounds else None

    def value(self, side: str, name: str) -> Summary | None:
        """Return the rounds of a value of ``ours``, ``tuned`` or ``default``."""
        rounds = self.document.get("values", {}).get(name, {}).get(side)
        return Summary(tuple(rounds)) if rounds else None


ROWS = (
    *(
        Row(
            "engine",
            f"ratio_default_vs_tuned_vllm_at_{num}",
            ">= 1.0",
            f"tokens_s_at_{num}",
            "tokens/s",
        )
        for num in (1, 8, 32)
    ),
    Row("engine", "ttft_ratio_vs_tuned_vllm_at_32", "<= 1.0", "ttft_ms_p50_at_32", "ms"),
    Row("engine", "ratio_vs_in_process", ">= 0.95"),
    Row("engine", "ratio_vs_tuned_serve_llm", ">= 1.0"),
    Row("stream", "paced_cpu_us_per_token", "<= 50", "paced_cpu_us", "µs"),
    Row("stream", "paced_cpu_ratio_vs_vllm_router", "<= 1.0"),
    Row("stream", "paced_cpu_ratio_vs_vllm_router_1000", "<= 1.0", "paced_cpu_us_1000", "µs"),
    Row("stream", "paced_cpu_ratio_vs_vllm_router_5000", "<= 1.0", "paced_cpu_us_5000", "µs"),
    Row("stream", "streams_per_core_vs_vllm_router", ">= 1.0", "streams_per_core", "streams"),
    Row("stream", "idle_pss_ratio_vs_vllm_router", "<= 1.2", "idle_pss_mb", "MB"),
    Row("stream", "ratio_vs_no_handover", ">= 0.97"),
    *(
        Row("classify", key, target, key, unit)
        for key, target, unit in (
            ("single_ratio_vs_openvino_bf16", "<= 0.9", "ms"),
            ("ratio_vs_kernel", ">= 0.9", "texts/s"),
            ("ratio_vs_kernel_single", ">= 0.75", "texts/s"),
            ("cpu_ratio_vs_kernel_single", "<= 1.15", "s per 1,000 texts"),
            ("ratio_fifo_vs_transformers_bf16", ">= 2.2", "texts/s"),
            ("ratio_int8_vs_bf16", ">= 1.3", "texts/s"),
        )
    ),
    Row("classify", "replica_pss_mb", "<= 900"),
    Row("routing", "decision_full_us_p99", "<= 50"),
    Row("routing", "ttft_p90_vs_best_peer_held_out", "<= 0.7"),
    Row("metrics", "ratio_metrics_on_off", ">= 0.98"),
    Row("start", "clone_to_first_answer_s", "<= 120"),
    Row("start", "warm_start_s", "<= 20"),
    Row("start", "idle_cpu_cores", "<= 0.05"),
    Row("start", "idle_memory_gb", "<= 3"),
    Row("mixed", "stream_p99_ratio", "<= 1.5"),
    Row("mixed", "classify_p99_ratio", "<= 1.5"),
    Row("overload", "victim_ttft_p99_ratio", "<= 1.5"),
)


def load_results(directory: Path = RESULTS) -> list[Result]:
    """Return the results in a directory, the newest first."""
    paths = sorted(directory.glob("*.json"))
    found = [Result(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return sorted(found, key=lambda result: result.machine["time"], reverse=True)


def make_table(results: Iterable[Result], rows: Iterable[Row] = ROWS) -> str:
    """Return the table as Markdown, the peers' command lines, and where each result is from."""
    results = list(results)
    lines, used = [HEADER, "|---" * 7 + "|"], []
    for row in rows:
        result = _find(results, row)
        lines.append(_line(row, result))
        if result is not None and result not in used:
            used.append(result)
    commands = [line for result in used for line in _commands(result)]
    origins = [f"- `{result.name}`: {format_machine(result.machine)}" for result in used]
    return "\n".join([*lines, "", *commands, *origins]).strip() + "\n"


def is_met(value: float, target: str) -> bool:
    """Return True if a value meets a target such as ``>= 1.0``."""
    compare, _, bound = target.partition(" ")
    return _COMPARE[compare](value, float(bound))


def insert_table(page: str, table: str) -> str:
    """Return the page with the table between its two markers.

    Raises:
        TandemError: The page does not have the markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise TandemError(f"{PAGE.name} must contain the lines {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n\n{table}\n{END}{after}"


def write_page(page: Path = PAGE, results: Path = RESULTS) -> None:
    """Write the table of the results in a directory into the page."""
    text = page.read_text(encoding="utf-8")
    page.write_text(insert_table(text, make_table(load_results(results))), encoding="utf-8")


def _find(results: Iterable[Result], row: Row) -> Result | None:
    of_benchmark = (r for r in results if r.document["benchmark"] == row.benchmark)
    return next((r for r in of_benchmark if r.summary(row.key) is not None), None)


def _line(row: Row, result: Result | None) -> str:
    summary = result.summary(row.key) if result is not None else None
    if result is None or summary is None:
        cells = [f"`{row.key}`", "", "", "", NOT_MEASURED, _number(row.target), ""]
        return f"| {' | '.join(cells)} |"
    values = [result.value(side, row.value) for side in ("ours", "tuned", "default")]
    shown = [f"{format_cell(value)} {row.unit}".strip() if value else "" for value in values]
    outcome = "met" if is_met(summary.median, row.target) else "**missed**"
    measured = f"{format_cell(summary)}, n = {len(summary.rounds)}"
    return f"| {' | '.join([f'`{row.key}`', *shown, measured, _number(row.target), outcome])} |"


def _number(target: str) -> str:
    return target.replace("<=", "≤").replace(">=", "≥")


def _commands(result: Result) -> list[str]:
    commands: Mapping[str, str] = result.document.get("commands", {})
    if not commands:
        return []
    lines = [f"Command lines of `{result.document['benchmark']}`:", ""]
    return [*lines, *(f"- `{name}`: `{line}`" for name, line in commands.items()), ""]
