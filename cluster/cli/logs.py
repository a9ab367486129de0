"""``tandem logs``: overview of log files and failures, or all lines of one request."""

import dataclasses
import json
from pathlib import Path

from rich.console import Console

from cluster.errors import NotFoundError
from cluster.launch import processes
from cluster.launch.log_files import (
    FailureGroup,
    LogEntry,
    entries_for_request,
    failed_requests,
    last_errors,
    log_directory,
    log_files,
)
from cluster.models.store import home

MAX_ERRORS = 20


def run(request_id: str | None, directory: Path | None, *, as_json: bool) -> None:
    """Print the overview, or the lines of one request.

    Raises:
        StartError: there are no logs.
        NotFoundError: no line contains the request id.
    """
    root = directory or log_directory(home())
    if request_id is None:
        running = directory is not None or bool(processes.find(home()))
        _overview(root, running=running, as_json=as_json)
        return
    found = entries_for_request(root, request_id)
    if not found:
        raise NotFoundError(
            f"request id {request_id!r} not found in {root}. Routers log a sample above "
            "router.log_requests_per_s; logs of other nodes are on these nodes."
        )
    _print(root, found, as_json=as_json)


def _overview(root: Path, *, running: bool, as_json: bool) -> None:
    errors, failed = last_errors(root, MAX_ERRORS), failed_requests(root)
    files = [path for path in log_files(root) if path.stat().st_size]
    if as_json:
        overview = {
            "directory": str(root),
            "running": running,
            "bytes": {str(path.relative_to(root)): path.stat().st_size for path in files},
            "failed_requests": [dataclasses.asdict(group) for group in failed],
            "errors": [_as_dict(root, entry) for entry in errors],
        }
        print(json.dumps(overview, indent=2))
        return
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for path in files:
        console.print(f"{path.stat().st_size / 1024:>9,.0f} KiB  {path.relative_to(root)}")
    console.print(f"\n{root}", style="bold")
    if not running:
        console.print("No cluster is running; these are the logs of the latest Ray session.")
    console.print(f"Last {len(errors)} errors:" if errors else "No errors.")
    _print(root, errors, as_json=False)
    console.print("Failed requests:" if failed else "No failed requests.")
    for group in failed:
        console.print(f"  {_format(group)}")


def _format(group: FailureGroup) -> str:
    target = " at ".join(name for name in (group.model or "no model", group.replica) if name)
    outcome = "cut off" if group.outcome == "cut_off" else f"status {group.status}"
    return f"{group.count} × {target}, {outcome}; last {group.last_time[:19]}, {group.last_id}"


def _print(root: Path, entries: list[LogEntry], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([_as_dict(root, entry) for entry in entries], indent=2))
        return
    console = Console(soft_wrap=True, highlight=False)
    current: Path | None = None
    for entry in entries:
        if entry.file != current:
            console.print(str(entry.file.relative_to(root)), style="bold", markup=False)
            current = entry.file
        console.print(f"  {entry.text}", markup=False)


def _as_dict(root: Path, entry: LogEntry) -> dict[str, str]:
    return {"file": str(entry.file.relative_to(root)), "time": entry.time, "text": entry.text}
