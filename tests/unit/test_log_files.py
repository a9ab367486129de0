import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli.app import app
from cluster.errors import NotFoundError, StartError
from cluster.launch.log_files import entries_of, last_errors, log_directory

ID = "abc-123"
REQUEST = {"time": "2026-01-02T03:04:05.500+00:00", "id": ID, "outcome": "failed"}
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


def test_every_line_of_a_request_is_found_with_what_goes_on_below_it(logs: Path) -> None:
    found = entries_of(logs, ID)
    assert [str(entry.file.relative_to(logs)) for entry in found] == [
        "binary.log",
        "worker-1.out",
        "serve/replica_tandem_router_xyz.log",
        "serve/tandem_requests_1_xyz.jsonl",
    ] or {entry.file.name for entry in found[:2]} == {"binary.log", "worker-1.out"}
    assert found[2].text.endswith("ZeroDivisionError: division by zero")
    assert found[2].time == "2026-01-02T03:04:05.400"


def test_an_id_is_no_pattern(logs: Path) -> None:
    assert entries_of(logs, ".*") == []


def test_the_last_errors_are_those_that_say_so(logs: Path) -> None:
    assert [entry.file.name for entry in last_errors(logs, 10)] == [
        "replica_tandem_router_xyz.log",
        "tandem_requests_1_xyz.jsonl",
    ]
    assert len(last_errors(logs, 1)) == 1


def test_a_file_that_may_not_be_read_hides_no_other(logs: Path) -> None:
    (logs / "gone.log").symlink_to(logs / "nowhere")
    os.mkfifo(logs / "pipe.log")
    assert len(entries_of(logs, ID)) == 4


def test_an_entry_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "long.log").write_text(f"ERROR {ID}\n" + "more\n" * 100_000)
    (entry,) = entries_of(tmp_path, ID)
    assert len(entry.text.splitlines()) == 200


def test_logs_are_of_the_last_session_where_no_cluster_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(StartError, match="no cluster runs"):
        log_directory(tmp_path / "home")
    for number, name in enumerate(("session_b", "session_a")):
        directory = tmp_path / "ray" / name
        (directory / "logs").mkdir(parents=True)
        os.utime(directory, (number, number))
    assert log_directory(tmp_path / "home") == tmp_path / "ray" / "session_a" / "logs"


def test_the_command_prints_text_and_json(logs: Path) -> None:
    shown = run("--directory", str(logs), "--request", ID)
    assert shown.exit_code == 0
    assert "ZeroDivisionError" in shown.stdout
    told = json.loads(run("--directory", str(logs), "--request", ID, "--json").stdout)
    assert len(told) == 4
    assert set(told[0]) == {"file", "time", "text"}
    overview = run("--directory", str(logs))
    assert "worker-1.out" in overview.stdout
    assert "the last errors (2)" in overview.stdout
    assert len(json.loads(run("--directory", str(logs), "--json").stdout)["bytes"]) == 5


def test_an_id_that_nobody_logged_is_an_error(logs: Path) -> None:
    assert isinstance(run("--directory", str(logs), "--request", "zzz").exception, NotFoundError)
