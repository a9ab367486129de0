"""``tandem batch``: submits files of requests, follows them, and fetches their results."""

import json
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.batches.types import FINAL
from cluster.cli.defaults import router_url
from cluster.cli.router_client import RouterClient, connect
from cluster.errors import ConfigError, TandemError, UnavailableError

PATH = "/v1/batches"
FILES_PATH = "/v1/files"
POLL_S = 1.0
LOST_S = 120.0
"""Seconds without an answer after which ``--wait`` gives up; routers may be replaced meanwhile."""


def submit(file: Path, hours: int, url: str | None, key: str | None, *, wait: bool) -> None:
    """Upload a file and create its batch; with ``wait``, follow it to its end.

    Raises:
        ConfigError: The file cannot be read, or names no endpoint.
        TandemError: The batch did not complete.
    """
    endpoint = _first_endpoint(file)
    with connect(router_url(url), key) as client:
        with file.open("rb") as content:
            uploaded = client.upload(FILES_PATH, file.name, content, {"purpose": "batch"})
        window = f"{hours}h"
        body = {"endpoint": endpoint, "completion_window": window, "input_file_id": uploaded["id"]}
        id_ = client.post(PATH, body)["id"]
        typer.echo(id_)
        if wait:
            _follow(client, id_)


def status(id_: str | None, url: str | None, key: str | None, *, wait: bool, as_json: bool) -> None:
    """Print one batch or the last ones; with ``wait``, follow one to its end."""
    with connect(router_url(url), key) as client:
        if id_ is None:
            found = client.get(PATH)["data"]
        else:
            found = [_follow(client, id_) if wait else client.get(f"{PATH}/{id_}")]
    if as_json:
        typer.echo(json.dumps(found if id_ is None else found[0], indent=2))
        return
    if not found:
        typer.echo("no batches")
    for batch in found:
        typer.echo(_describe(batch))
        for error in (batch["errors"] or {}).get("data", ()):
            typer.echo(f"  line {error['line']}: {error['code']}: {error['message']}")


def cancel(id_: str, url: str | None, key: str | None) -> None:
    """Cancel a batch."""
    with connect(router_url(url), key) as client:
        typer.echo(_describe(client.post(f"{PATH}/{id_}/cancel", {})))


def results(id_: str, out: Path | None, url: str | None, key: str | None, *, errors: bool) -> None:
    """Write the answers, or the failed lines, of a finished batch.

    Raises:
        ConfigError: There are none.
    """
    kind = "error" if errors else "output"
    with connect(router_url(url), key) as client:
        batch = client.get(f"{PATH}/{id_}")
        file_id = batch[f"{kind}_file_id"]
        if file_id is None:
            raise ConfigError(f"{_describe(batch)}: it has no {kind} file")
        target = nullcontext(sys.stdout.buffer) if out is None else out.open("wb")
        with target as file:
            for chunk in client.download(f"{FILES_PATH}/{file_id}/content"):
                file.write(chunk)


def _first_endpoint(file: Path) -> str:
    try:
        with file.open("rb") as content:
            return str(json.loads(content.readline())["url"])
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f'{file}: line 1 must be a JSON object with a "url" (docs/how-to/batches.md)'
        ) from None


def _follow(client: RouterClient, id_: str) -> Mapping[str, Any]:
    """Show the progress of a batch until it ends; return it.

    Raises:
        TandemError: It ended otherwise than completed.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task, answered_at = progress.add_task("validating", total=None), time.monotonic()
        while True:
            try:
                batch = client.get(f"{PATH}/{id_}")
                answered_at = time.monotonic()
            except UnavailableError:
                if time.monotonic() - answered_at > LOST_S:
                    raise
                time.sleep(POLL_S)
                continue
            counts = batch["request_counts"]
            progress.update(
                task,
                description=batch["status"],
                total=counts["total"] or None,
                completed=counts["completed"] + counts["failed"],
            )
            if batch["status"] in FINAL:
                break
            time.sleep(POLL_S)
    if batch["status"] != "completed":
        raise TandemError(_describe(batch))
    return dict(batch)


def _describe(batch: Mapping[str, Any]) -> str:
    counts, cost = batch["request_counts"], batch["tandem"]
    text = (
        f"{batch['id']}  {batch['status']}  {counts['completed']} of {counts['total']} lines, "
        f"{counts['failed']} failed, {batch['usage']['total_tokens']} tokens"
    )
    return text if cost["cost"] is None else f"{text}, {cost['cost']:.4f} {cost['currency']}"
