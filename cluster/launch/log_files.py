"""The logs of a cluster's processes, and the lines in them that belong to one request.

Ray keeps the logs of all processes of a node below its session's directory. Reads, owns nothing.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.errors import StartError
from cluster.launch import processes

MAX_MORE_LINES = 200
"""Of one entry of a log: a traceback, say."""
_HEAD = re.compile(rb"^(?:\{|\[|\(|DEBUG|INFO|WARN|ERROR|CRITICAL|FATAL|\d{4}-\d\d-\d\d)")
_BAD = re.compile(rb"\b(?:ERROR|CRITICAL|FATAL)\b")
_FAILED = re.compile(rb"\"outcome\":\"(?:failed|cut_off)\"")
REQUEST_LOGS = "serve/tandem_requests_*"
"""What routers wrote of each request (``deployments/request_log.py``)."""
_TIME = re.compile(rb"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?")
_TAIL_BYTES = 1024**2
_LOG_DIR = re.compile(r"^--log[_-]dir=(.+)$")


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a log: a line, and those that go on with it."""

    file: Path
    time: str
    """As it stands there; that of the entry before where it has none."""
    text: str


@dataclass(slots=True)
class Failures:
    """Requests that failed alike, as far as the request logs' ends go back."""

    model: str
    replica: str
    """At which they had a place; "" where they had none."""
    status: int
    outcome: str
    count: int = 0
    """Those that were logged: there may have been more."""
    last_id: str = ""
    last_time: str = ""


def log_directory(home: Path) -> Path:
    """Where the running cluster's logs are, else those of the Ray session that began last.

    Raises:
        StartError: there is none.
    """
    for owned in processes.find(home):
        try:
            arguments = owned.process.cmdline() if owned.name == "gcs_server" else []
        except psutil.Error:
            continue
        for argument in arguments:
            if (found := _LOG_DIR.match(argument)) and Path(found[1]).is_dir():
                return Path(found[1])
    root = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
    sessions = [path for path in root.glob("session_*/logs") if path.is_dir()]
    if not sessions:
        raise StartError(f"there are no logs: no cluster runs, and {root} has no session of Ray")
    return max(sessions, key=lambda path: path.parent.stat().st_mtime)


def log_files(directory: Path) -> list[Path]:
    """Every log below ``directory``, those that were written last at the end."""
    found = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def entries_of(directory: Path, request_id: str) -> list[Entry]:
    """What all processes logged with this request id, in the order of its times."""
    # vLLM writes an id with a prefix and a suffix of its own: chatcmpl-ID, cmpl-ID-0.
    wanted = re.compile(rb"(?<![0-9A-Za-z])" + re.escape(request_id.encode()) + rb"(?![0-9A-Za-z])")
    found = [entry for path in log_files(directory) for entry in _matching(path, wanted)]
    return sorted(found, key=lambda entry: entry.time)


def last_errors(directory: Path, count: int) -> list[Entry]:
    """The last ``count`` entries that tell of an error, from the end of each log."""
    found = [entry for path in log_files(directory) for entry in _at_end(path, _BAD)]
    return sorted(found, key=lambda entry: entry.time)[-count:]


def failed_requests(directory: Path) -> list[Failures]:
    """The requests that failed or were cut off, by model, replica and status; the most first."""
    found: dict[tuple[str, str, int, str], Failures] = {}
    for path in sorted(directory.glob(REQUEST_LOGS)):
        for entry in _at_end(path, _FAILED):
            try:
                line = json.loads(entry.text)
            except ValueError:  # the tail begins in its midst
                continue
            place = line.get("model", ""), line.get("replica", "")
            kind = *place, line["status"], line["outcome"]
            failures = found.setdefault(kind, Failures(*kind))
            failures.count += 1
            if entry.time >= failures.last_time:
                failures.last_id, failures.last_time = line["id"], entry.time
    return sorted(found.values(), key=lambda failures: -failures.count)


def _at_end(path: Path, wanted: re.Pattern[bytes]) -> Iterator[Entry]:
    return _matching(path, wanted, tail_bytes=_TAIL_BYTES)


def _matching(
    path: Path, wanted: re.Pattern[bytes], tail_bytes: int | None = None
) -> Iterator[Entry]:
    lines: list[bytes] = []
    time = ""
    try:
        with path.open("rb") as file:
            if tail_bytes is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - tail_bytes))
            for line in file:
                begins = bool(_HEAD.match(line))
                if lines and begins:
                    yield Entry(path, time, _text(lines))
                    lines = []
                if begins and (stamp := _TIME.search(line)):
                    time = stamp[0].decode().replace(" ", "T").replace(",", ".")
                if (lines and len(lines) < MAX_MORE_LINES) or (not lines and wanted.search(line)):
                    lines.append(line)
    except OSError:  # rotated away meanwhile, or another user's
        return
    if lines:
        yield Entry(path, time, _text(lines))


def _text(lines: list[bytes]) -> str:
    return b"".join(lines).decode(errors="replace").rstrip()
