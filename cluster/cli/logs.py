"""``tandem logs``: where the logs are and what went wrong last, or every line of one request."""

import dataclasses
import json
from pathlib import Path

from rich.console import Console

from cluster.errors import NotFoundError
from cluster.launch import processes
from cluster.launch.log_files import (
    Entry,
    Failures,
    entries_of,
    failed_requests,
    last_errors,
    log_directory,
    log_files,
)
from cluster.models.store import home

MAX_ERRORS = 20


def run(request_id: str | None, directory: Path | None, *, as_json: bool) -> None:
    """Print what ``tandem logs`` was asked for.

    Raises:
        StartError: there are no logs.
        NotFoundError: no line has the request's id.
    """
    where = directory or log_directory(home())
    if request_id is None:
        running = directory is not None or processes.has_head(processes.find(home()))
        _overview(where, running=running, as_json=as_json)
        return
    found = entries_of(where, request_id)
    if not found:
        raise NotFoundError(
            f"no line of {where} has the request id {request_id!r}: above "
            "router.log_requests_per_s only a sample is logged, and other nodes keep their own"
        )
    _print(where, found, as_json=as_json)


def _overview(where: Path, *, running: bool, as_json: bool) -> None:
    errors, failed = last_errors(where, MAX_ERRORS), failed_requests(where)
    files = [path for path in log_files(where) if path.stat().st_size]
    if as_json:
        told = {
            "directory": str(where),
            "running": running,
            "bytes": {str(path.relative_to(where)): path.stat().st_size for path in files},
            "failed_requests": [dataclasses.asdict(failures) for failures in failed],
            "errors": [_as_dict(where, entry) for entry in errors],
        }
        print(json.dumps(told, indent=2))
        return
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for path in files:
        console.print(f"{path.stat().st_size / 1024:>9,.0f} KiB  {path.relative_to(where)}")
    console.print(f"\n{where}", style="bold")
    if not running:
        console.print("no cluster of this home runs: this is the Ray session that began last")
    console.print(f"the last errors ({len(errors)}):" if errors else "no errors")
    _print(where, errors, as_json=False)
    console.print("requests that failed and were logged:" if failed else "no request failed")
    for failures in failed:
        console.print(f"  {_told(failures)}")


def _told(failures: Failures) -> str:
    replica = f" at {failures.replica}" if failures.replica else ""
    how = "cut off" if failures.outcome == "cut_off" else f"status {failures.status}"
    last = f"the last {failures.last_time[:19]}, {failures.last_id}"
    return f"{failures.count} of {failures.model or 'no pool'}{replica}, {how}; {last}"


def _print(where: Path, entries: list[Entry], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([_as_dict(where, entry) for entry in entries], indent=2))
        return
    console = Console(soft_wrap=True, highlight=False)
    seen: Path | None = None
    for entry in entries:
        if entry.file != seen:
            console.print(str(entry.file.relative_to(where)), style="bold", markup=False)
            seen = entry.file
        console.print(f"  {entry.text}", markup=False)


def _as_dict(where: Path, entry: Entry) -> dict[str, str]:
    return {"file": str(entry.file.relative_to(where)), "time": entry.time, "text": entry.text}
