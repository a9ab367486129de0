"""``tandem logs``: overview of log files and failures, or all lines of one request."""

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import typer
from rich.console import Console

from cluster.cli.router_client import connect
from cluster.errors import NotFoundError
from cluster.launch import processes, state
from cluster.launch.log_files import (
    FailureGroup,
    describe_logs,
    entries_for_request,
    log_directory,
)
from cluster.launch.remote_logs import download_logs
from cluster.models.store import home
from cluster.operator_api import LOGS_PATH, describe_missing_request


def run(request_id: str | None, directory: Path | None, *, as_json: bool) -> None:
    """Print the overview, or the lines of one request; of all nodes of the running cluster.

    Raises:
        StartError: there are no logs.
        NotFoundError: no line contains the request id.
    """
    with _logs(directory) as logs:
        if request_id is None:
            found = describe_logs(logs.root)
            _overview(found, logs.name, running=logs.running, as_json=as_json)
            return
        entries = entries_for_request(logs.root, request_id)
        if not entries:
            raise NotFoundError(describe_missing_request(request_id, logs.name))
        _print([entry.as_dict(logs.root) for entry in entries], as_json=as_json)


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


def run_remote(url: str, key: str | None, request_id: str | None, *, as_json: bool) -> None:
    """Print the overview of a cluster on other machines, or the lines of one request.

    Raises:
        TandemError: no router responds, or the key is not an operator's.
    """
    query = f"?request={quote(request_id, safe='')}" if request_id else ""
    with connect(url, key) as router:
        found = router.get(f"{LOGS_PATH}{query}")
    for problem in found["problems"]:
        typer.echo(problem, err=True)
    if request_id is not None:
        _print(found["entries"], as_json=as_json)
        if found["truncated"]:
            number = len(found["entries"])
            typer.echo(
                f"Only the first {number:,} entries are shown; `tandem logs --request` on a node "
                "of the cluster shows all.",
                err=True,
            )
    else:
        _overview(found, url, running=True, as_json=as_json)


def _overview(found: dict[str, Any], name: str, *, running: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"directory": name, "running": running, **found}, indent=2))
        return
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for path, size in found["bytes"].items():
        console.print(f"{size / 1024:>9,.0f} KiB  {path}")
    errors, failed = found["errors"], found["failed_requests"]
    console.print(f"\n{name}", style="bold")
    if not running:
        console.print("No cluster is running; these are the logs of the latest Ray session.")
    console.print(f"Last {len(errors)} errors:" if errors else "No errors.")
    _print(errors, as_json=False)
    console.print("Failed requests:" if failed else "No failed requests.")
    for group in failed:
        console.print(f"  {_format(FailureGroup(**group))}")


def _format(group: FailureGroup) -> str:
    target = " at ".join(name for name in (group.model or "no model", group.replica) if name)
    outcome = "cut off" if group.outcome == "cut_off" else f"status {group.status}"
    return f"{group.count} × {target}, {outcome}; last {group.last_time[:19]}, {group.last_id}"


def _print(entries: list[dict[str, str]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    console = Console(soft_wrap=True, highlight=False)
    current = ""
    for entry in entries:
        if entry["file"] != current:
            current = entry["file"]
            console.print(current, style="bold", markup=False)
        console.print(f"  {entry['text']}", markup=False)
