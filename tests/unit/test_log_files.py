import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli.app import app
from cluster.errors import NotFoundError, StartError
from cluster.launch.log_files import (
    entries_for_request,
    failed_requests,
    last_errors,
    log_directory,
)

ID = "abc-123"
REQUEST = {
    "time": "2026-01-02T03:04:05.500+00:00",
    "id": ID,
    "status": 503,
    "outcome": "failed",
}
FILES = {
    "serve/tandem_requests_1_xyz.jsonl": json.dumps(REQUEST, separators=(",", ":")) + "\n",
    "serve/replica_tandem_router_xyz.log": (
        "INFO 2026-01-02 03:04:05,100 tandem_router xyz -- something else\n"
        f"ERROR 2026-01-02 03:04:05,400 tandem_router xyz -- {ID} failed\n"
        "Traceback (most recent call last):\n"
        '  File "x.py", line 1, in <module>\n'
        "ZeroDivisionError: division by zero\n"
        "INFO 2026-01-02 03:04:06,100 tandem_router xyz -- [more]\n"
    ),
    "worker-1.out": f"(EngineCore) INFO 01-02 03:04:05 Added request chatcmpl-{ID}-0.\n",
    "worker-2.out": f"INFO 2026-01-02 03:04:05,000 {ID}4 is another, and so is x{ID}\n",
    "binary.log": "\udcff\udcfe" + ID + "\n",
}


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "logs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
    return tmp_path / "logs"


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["logs", *args])


def test_all_entries_of_a_request_are_found_with_continuation_lines(logs: Path) -> None:
    found = entries_for_request(logs, ID)
    assert [str(entry.file.relative_to(logs)) for entry in found] == [
        "binary.log",
        "worker-1.out",
        "serve/replica_tandem_router_xyz.log",
        "serve/tandem_requests_1_xyz.jsonl",
    ] or {entry.file.name for entry in found[:2]} == {"binary.log", "worker-1.out"}
    assert found[2].text.endswith("ZeroDivisionError: division by zero")
    assert found[2].time == "2026-01-02T03:04:05.400"


def test_a_request_id_is_not_a_regular_expression(logs: Path) -> None:
    assert entries_for_request(logs, ".*") == []


def test_last_errors_are_selected_by_level(logs: Path) -> None:
    (entry,) = last_errors(logs, 10)
    assert entry.file.name == "replica_tandem_router_xyz.log"
    (logs / "later.log").write_text("[2026-01-02 03:04:09,000 E 1 1] x.cc:1: CRITICAL\n")
    (entry,) = last_errors(logs, 1)
    assert entry.file.name == "later.log"


def test_failed_requests_are_grouped_by_replica_and_outcome(logs: Path) -> None:
    file = logs / "serve" / "tandem_requests_2_uvw.jsonl"
    kinds = [("a", 500, "failed"), ("b", 200, "cut_off"), ("a", 500, "failed"), ("a", 200, "ok")]
    lines = [
        json.dumps(
            {
                "time": f"2026-01-02T03:04:0{second}.000+00:00",
                "id": f"r{second}",
                "model": "m",
                "replica": replica,
                "status": status,
                "outcome": outcome,
            },
            separators=(",", ":"),
        )
        for second, (replica, status, outcome) in enumerate(kinds)
    ]
    file.write_text('3,"outcome":"failed"}\n' + "\n".join(lines))
    found = failed_requests(logs)
    assert [(f.model, f.replica, f.status, f.outcome, f.count, f.last_id) for f in found] == [
        ("m", "a", 500, "failed", 2, "r2"),
        ("", "", 503, "failed", 1, ID),
        ("m", "b", 200, "cut_off", 1, "r1"),
    ]
    shown = run("--directory", str(logs)).stdout
    assert "2 × m at a, status 500; last 2026-01-02T03:04:02, r2" in shown
    assert "1 × m at b, cut off" in shown
    assert len(json.loads(run("--directory", str(logs), "--json").stdout)["failed_requests"]) == 3


def test_file_names_are_not_truncated_on_narrow_terminals(logs: Path) -> None:
    name = f"worker-{'0123456789abcdef' * 6}.out"
    (logs / name).write_text("x")
    assert name in run("--directory", str(logs)).stdout


def test_unreadable_files_are_skipped(logs: Path) -> None:
    (logs / "gone.log").symlink_to(logs / "nowhere")
    os.mkfifo(logs / "pipe.log")
    assert len(entries_for_request(logs, ID)) == 4


def test_entries_are_limited_in_length(tmp_path: Path) -> None:
    (tmp_path / "long.log").write_text(f"ERROR {ID}\n" + "more\n" * 100_000)
    (entry,) = entries_for_request(tmp_path, ID)
    assert len(entry.text.splitlines()) == 200


def test_without_a_cluster_logs_of_the_latest_session_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(StartError, match="no cluster is running"):
        log_directory(tmp_path / "home")
    for number, name in enumerate(("session_b", "session_a")):
        directory = tmp_path / "ray" / name
        (directory / "logs").mkdir(parents=True)
        os.utime(directory, (number, number))
    assert log_directory(tmp_path / "home") == tmp_path / "ray" / "session_a" / "logs"


def test_command_prints_text_and_json(logs: Path) -> None:
    shown = run("--directory", str(logs), "--request", ID)
    assert shown.exit_code == 0
    assert "ZeroDivisionError" in shown.stdout
    entries = json.loads(run("--directory", str(logs), "--request", ID, "--json").stdout)
    assert len(entries) == 4
    assert set(entries[0]) == {"file", "time", "text"}
    overview = run("--directory", str(logs))
    assert "worker-1.out" in overview.stdout
    assert "Last 1 errors:" in overview.stdout
    assert len(json.loads(run("--directory", str(logs), "--json").stdout)["bytes"]) == 5


def test_an_unknown_request_id_is_an_error(logs: Path) -> None:
    assert isinstance(run("--directory", str(logs), "--request", "zzz").exception, NotFoundError)
