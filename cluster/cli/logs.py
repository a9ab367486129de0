"""``tandem logs``: overview of log files and failures, or all lines of one request."""

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

from cluster.errors import NotFoundError
from cluster.launch import processes, state
from cluster.launch.log_files import (
    FailureGroup,
    LogEntry,
    entries_for_request,
    failed_requests,
    last_errors,
    log_directory,
    log_files,
)
from cluster.launch.remote_logs import download_logs
from cluster.models.store import home

MAX_ERRORS = 20


def run(request_id: str | None, directory: Path | None, *, as_json: bool) -> None:
    """Print the overview, or the lines of one request; of all nodes of the running cluster.

    Raises:
        StartError: there are no logs.
        NotFoundError: no line contains the request id.
    """
    with _logs(directory) as logs:
        if request_id is None:
            _overview(logs, as_json=as_json)
            return
        found = entries_for_request(logs.root, request_id)
        if not found:
            raise NotFoundError(
                f"request id {request_id!r} not found in {logs.name}. Routers log a sample above "
                "router.log_requests_per_s."
            )
        _print(logs.root, found, as_json=as_json)


@dataclasses.dataclass(frozen=True, slots=True)
class _Logs:
    root: Path
    name: str
    running: bool


@contextmanager
def _logs(directory: Path | None) -> Iterator[_Logs]:
    """Yield the logs of this node, or copies of those of all nodes if there are several."""
    owned, known = processes.find(home()), state.load(home())
    has_nodes = directory is None and known is not None and known.address is not None
    if known is None or not has_nodes or not state.is_alive(owned, known):
        root = directory or log_directory(home())
        yield _Logs(root, str(root), directory is not None or bool(owned))
        return
    with tempfile.TemporaryDirectory(prefix="tandem-logs-") as scratch:
        for problem in download_logs(known.dashboard_url, known.token(home()), Path(scratch)):
            typer.echo(problem, err=True)
        yield _Logs(Path(scratch), f"all nodes of {known.ray_address}", running=True)


def _overview(logs: _Logs, *, as_json: bool) -> None:
    root = logs.root
    errors, failed = last_errors(root, MAX_ERRORS), failed_requests(root)
    files = [path for path in log_files(root) if path.stat().st_size]
    if as_json:
        overview = {
            "directory": logs.name,
            "running": logs.running,
            "bytes": {str(path.relative_to(root)): path.stat().st_size for path in files},
            "failed_requests": [dataclasses.asdict(group) for group in failed],
            "errors": [_as_dict(root, entry) for entry in errors],
        }
        print(json.dumps(overview, indent=2))
        return
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for path in files:
        console.print(f"{path.stat().st_size / 1024:>9,.0f} KiB  {path.relative_to(root)}")
    console.print(f"\n{logs.name}", style="bold")
    if not logs.running:
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
