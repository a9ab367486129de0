"""Arguments and help of ``tandem batch``."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from cluster.cli.options import JsonOption, KeyOption, UrlOption

batch_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Run files of requests at the lowest priority (OpenAI's batch API).",
)

_Batch = Annotated[str, Argument(metavar="BATCH", help="Id of a batch.")]
_Wait = Annotated[bool, Option("--wait", help="Show the progress until the batch ends.")]


@batch_app.command("submit")
def batch_submit(
    file: Annotated[Path, Argument(help="JSON lines in OpenAI's batch format.")],
    hours: Annotated[int, Option(min=1, max=168, help="Hours until unanswered lines expire.")] = 24,
    wait: _Wait = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Upload a file, run its requests as a batch, and print the batch's id."""
    from cluster.cli.batch import submit

    submit(file, hours, url, api_key, wait=wait)


@batch_app.command("status")
def batch_status(
    batch: Annotated[str | None, Argument(metavar="[BATCH]", help="Default: the last 20.")] = None,
    wait: _Wait = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show progress, tokens and cost of batches."""
    from cluster.cli.batch import status

    status(batch, url, api_key, wait=wait, as_json=as_json)


@batch_app.command("cancel")
def batch_cancel(batch: _Batch, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Stop a batch; its results so far stay."""
    from cluster.cli.batch import cancel

    cancel(batch, url, api_key)


@batch_app.command("results")
def batch_results(
    batch: _Batch,
    out: Annotated[
        Path | None, Option("--out", help="File to write.", show_default="standard output")
    ] = None,
    errors: Annotated[bool, Option("--errors", help="Failed lines instead of answers.")] = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Write the answers of a finished batch, one JSON object per line."""
    from cluster.cli.batch import results

    results(batch, out, url, api_key, errors=errors)
