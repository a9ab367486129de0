"""Log files of a cluster's processes, and searches in them.

Ray keeps the logs of all processes of a node in the session's directory.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.errors import StartError
from cluster.launch import processes

MAX_ERRORS = 20
"""Errors in an overview."""
MAX_ENTRY_LINES = 200  # of one entry, such as a traceback
_ENTRY_START = re.compile(rb"^(?:\{|\[|\(|DEBUG|INFO|WARN|ERROR|CRITICAL|FATAL|\d{4}-\d\d-\d\d)")
_ERROR_LEVEL = re.compile(rb"\b(?:ERROR|CRITICAL|FATAL)\b")
_FAILED_REQUEST = re.compile(rb"\"outcome\":\"(?:failed|cut_off)\"")
REQUEST_LOGS = "serve/tandem_requests_*"
"""Glob of the routers' request logs, relative to the log directory of a node."""
_TIMESTAMP = re.compile(rb"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?")
_TAIL_BYTES = 1024**2
_LOG_DIR_OPTION = re.compile(r"^--logs?[_-]dir=(.+)$")


@dataclass(frozen=True, slots=True)
class LogEntry:
    """Entry of a log: a line and its continuation lines."""

    file: Path
    time: str
    """Time in ISO 8601 as logged; the previous entry's time if the entry has none."""
    text: str

    def as_dict(self, root: Path) -> dict[str, str]:
        """Return the entry for JSON, with a path relative to ``root``."""
        return {"file": str(self.file.relative_to(root)), "time": self.time, "text": self.text}


@dataclass(slots=True)
class FailureGroup:
    """Logged requests that failed in the same way."""

    model: str
    replica: str
    """Replica that had the requests; empty if none had."""
    status: int
    outcome: str
    count: int = 0
    """Number of logged requests; routers may log only a sample."""
    last_id: str = ""
    last_time: str = ""


def log_directory(home: Path) -> Path:
    """Return the log directory of the running cluster, or else of the latest Ray session.

    Raises:
        StartError: there are no logs.
    """
    for owned in processes.find(home):
        try:
            arguments = owned.process.cmdline()
        except psutil.Error:
            continue
        for argument in arguments:
            if (found := _LOG_DIR_OPTION.match(argument)) and Path(found[1]).is_dir():
                return Path(found[1])
    root = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
    sessions = [path for path in root.glob("session_*/logs") if path.is_dir()]
    if not sessions:
        raise StartError(f"no logs found: no cluster is running, and {root} has no Ray session")
    return max(sessions, key=lambda path: path.parent.stat().st_mtime)


def log_files(directory: Path) -> list[Path]:
    """Return all log files below ``directory``, the most recently written last."""
    found = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def entries_for_request(directory: Path, request_id: str) -> list[LogEntry]:
    """Return the log entries of all processes that contain this request id, ordered by time."""
    # vLLM adds a prefix and a suffix to the id: chatcmpl-ID, cmpl-ID-0.
    pattern = re.compile(
        rb"(?<![0-9A-Za-z])" + re.escape(request_id.encode()) + rb"(?![0-9A-Za-z])"
    )
    found = [entry for path in log_files(directory) for entry in _matching(path, pattern)]
    return sorted(found, key=lambda entry: entry.time)


def last_errors(directory: Path, count: int) -> list[LogEntry]:
    """Return the latest ``count`` error entries from the ends of all logs."""
    found = [
        entry
        for path in log_files(directory)
        for entry in _matching(path, _ERROR_LEVEL, _TAIL_BYTES)
    ]
    return sorted(found, key=lambda entry: entry.time)[-count:]


def describe_logs(root: Path) -> dict[str, Any]:
    """Return sizes of all log files, the latest errors, and failed requests, for JSON."""
    files = [path for path in log_files(root) if path.stat().st_size]
    return {
        "bytes": {str(path.relative_to(root)): path.stat().st_size for path in files},
        "failed_requests": [asdict(group) for group in failed_requests(root)],
        "errors": [entry.as_dict(root) for entry in last_errors(root, MAX_ERRORS)],
    }


def failed_requests(directory: Path) -> list[FailureGroup]:
    """Return failed and cut-off requests by model, replica and status, most frequent first."""
    groups: dict[tuple[str, str, int, str], FailureGroup] = {}
    for path in sorted(directory.rglob(REQUEST_LOGS)):
        for entry in _matching(path, _FAILED_REQUEST, _TAIL_BYTES):
            try:
                line = json.loads(entry.text)
            except ValueError:  # first line of the tail, cut off at its start
                continue
            target = line.get("model", ""), line.get("replica", "")
            key = *target, line["status"], line["outcome"]
            group = groups.setdefault(key, FailureGroup(*key))
            group.count += 1
            if entry.time >= group.last_time:
                group.last_id, group.last_time = line["id"], entry.time
    return sorted(groups.values(), key=lambda group: -group.count)


def _matching(
    path: Path, pattern: re.Pattern[bytes], tail_bytes: int | None = None
) -> Iterator[LogEntry]:
    lines: list[bytes] = []
    time = ""
    try:
        with path.open("rb") as file:
            if tail_bytes is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - tail_bytes))
            for line in file:
                is_start = bool(_ENTRY_START.match(line))
                if lines and is_start:
                    yield LogEntry(path, time, _text(lines))
                    lines = []
                if is_start and (stamp := _TIMESTAMP.search(line)):
                    time = stamp[0].decode().replace(" ", "T").replace(",", ".")
                if (lines and len(lines) < MAX_ENTRY_LINES) or (not lines and pattern.search(line)):
                    lines.append(line)
    except OSError:  # rotated away, or owned by another user
        return
    if lines:
        yield LogEntry(path, time, _text(lines))


def _text(lines: list[bytes]) -> str:
    return b"".join(lines).decode(errors="replace").rstrip()
