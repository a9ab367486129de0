"""The table at the top of docs/performance.md."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.page import Row
from benchmarks.report import Report, as_json, write_json
from benchmarks.rounds import Summary
from cluster.errors import TandemError

ROWS = (
    Row("engine", "ratio", ">= 1.0", "tokens_s", "tokens/s"),
    Row("engine", "other", "<= 2"),
    Row("mixed", "ratio", "<= 1.5"),
)


def write_result(path: Path, benchmark: str = "engine", ratio: float = 1.5) -> None:
    report = Report(
        keys={"ratio": Summary((ratio, 0.9, 2.0)), "other": Summary((3.0,))},
        values={"tokens_s": {"ours": Summary((150.0,)), "tuned": Summary((100.0,))}},
        commands={"peer": "peer --fast"},
    )
    write_json(path, argparse.Namespace(benchmark=benchmark, json=path), report)


def table(directory: Path) -> list[str]:
    return page.make_table(page.load_results(directory), ROWS).splitlines()


def test_the_page_has_the_table_of_the_committed_results() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.insert_table(text, page.make_table(page.load_results())) == text, (
        "run ./scripts/bench report"
    )


def test_the_table_says_what_met_its_target_and_what_was_not_measured(tmp_path: Path) -> None:
    write_result(tmp_path / "engine.json")
    lines = table(tmp_path)
    assert lines[2:5] == [
        "| `ratio` | 150 tokens/s | 100 tokens/s |  | 1.5 (0.9 – 2), n = 3 | ≥ 1.0 | met |",
        "| `other` |  |  |  | 3, n = 1 | ≤ 2 | **missed** |",
        "| `ratio` |  |  |  | not measured | ≤ 1.5 |  |",
    ]
    assert "- `peer`: `peer --fast`" in lines
    assert lines[-1].startswith("- `engine`: 20")
    assert "commit " in lines[-1]


def test_the_newest_result_of_a_key_counts(tmp_path: Path) -> None:
    for name, ratio, time in (("a", 1.1, "2026-02-01"), ("b", 1.2, "2026-01-01")):
        path = tmp_path / f"{name}.json"
        write_result(path, ratio=ratio)
        document = json.loads(path.read_text(encoding="utf-8"))
        document["machine"]["time"] = time
        path.write_text(json.dumps(document), encoding="utf-8")
    assert "| 1.1 (0.9 – 2), n = 3 |" in table(tmp_path)[2]


def test_a_page_without_the_markers_is_rejected() -> None:
    with pytest.raises(TandemError, match="must contain the lines"):
        page.insert_table("# Performance\n", "table\n")


def test_a_json_document_names_commit_kernel_and_versions() -> None:
    machine = as_json(argparse.Namespace(benchmark="engine"), Report({}))["machine"]
    assert {"commit", "system", "packages", "time", "processor", "memory_gib"} <= set(machine)
