"""``tandem logs``: where the logs are and what went wrong last, or every line of one request."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.errors import NotFoundError
from cluster.launch.log_files import Entry, entries_of, last_errors, log_directory, log_files
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
        _overview(where, as_json=as_json)
        return
    found = entries_of(where, request_id)
    if not found:
        raise NotFoundError(
            f"no line of {where} has the request id {request_id!r}: above "
            "router.log_requests_per_s only a sample is logged, and other nodes keep their own"
        )
    _print(where, found, as_json=as_json)


def _overview(where: Path, *, as_json: bool) -> None:
    errors = last_errors(where, MAX_ERRORS)
    files = [path for path in log_files(where) if path.stat().st_size]
    if as_json:
        sizes = {str(path.relative_to(where)): path.stat().st_size for path in files}
        told = [_as_dict(where, entry) for entry in errors]
        print(json.dumps({"directory": str(where), "bytes": sizes, "errors": told}, indent=2))
        return
    console = Console(soft_wrap=True, highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    for path in files:
        table.add_row(f"{path.stat().st_size / 1024:,.0f} KiB", str(path.relative_to(where)))
    console.print(f"{where}, the ones written last at the end:")
    console.print(table)
    console.print(f"\nthe last errors ({len(errors)}):" if errors else "\nno errors")
    _print(where, errors, as_json=False)


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
