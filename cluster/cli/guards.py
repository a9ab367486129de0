"""``tandem guard test``: what the guards find in the texts of a file."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from cluster.cli.defaults import router_url
from cluster.cli.router_client import RouterClient, connect
from cluster.config.guards import GuardOutcome
from cluster.errors import DataError
from cluster.models.data_file import DataRow, read_rows

PATH = "/v1/guards/test"
TEXTS_PER_REQUEST = 64
OUTCOMES = get_args(GuardOutcome)
MAX_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class GuardTestOptions:
    """Options of the command."""

    file: Path
    text_column: str
    expect_column: str | None
    """Column with the expected outcome of each text; None: nothing is expected."""
    answers: bool
    guards: list[str] | None


def test(options: GuardTestOptions, url: str | None, key: str | None, *, as_json: bool) -> None:
    """Print the outcome of each text.

    Raises:
        DataError: the file cannot be read, or an expected outcome does not exist.
        typer.Exit: with status 1 if an outcome is not the expected one, or a check failed.
    """
    rows = read_rows(options.file, options.text_column, options.expect_column)
    for row in rows:
        if options.expect_column is not None and row.label not in OUTCOMES:
            allowed = ", ".join(OUTCOMES)
            raise DataError(f"{options.file}:{row.line}: got {row.label!r}; allowed: {allowed}")
    with connect(router_url(url), key) as router:
        found = [result for part in _ask(router, rows, options) for result in part]
    wrong = [
        (row, result)
        for row, result in zip(rows, found, strict=True)
        if (row.label and row.label != result["outcome"])
        or result["outcome"] in ("unchecked", "refused")
    ]
    if as_json:
        lines = [
            {"line": row.line, "expected": row.label or None, **result}
            for row, result in zip(rows, found, strict=True)
        ]
        typer.echo(json.dumps(lines, indent=2, ensure_ascii=False))
    else:
        _print(rows, found, {row.line for row, _ in wrong})
    if wrong:
        raise typer.Exit(1)


def _ask(
    router: RouterClient, rows: Sequence[DataRow], options: GuardTestOptions
) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), TEXTS_PER_REQUEST):
        body: dict[str, Any] = {
            "input": [row.text for row in rows[start : start + TEXTS_PER_REQUEST]],
            "stage": "answer" if options.answers else "prompt",
        }
        if options.guards:
            body["guards"] = options.guards
        yield router.post(PATH, body)["data"]


def _print(rows: Sequence[DataRow], found: Sequence[dict[str, Any]], wrong: set[int]) -> None:
    table = Table(box=None)
    for title in ("line", "outcome", "expected", "found", "text"):
        table.add_column(title, no_wrap=title in ("line", "outcome", "expected"))
    for row, result in zip(rows, found, strict=True):
        labels = Counter(
            f"{each['guard']}: {part['label']}"
            for each in result["guards"]
            for part in each["found"]
        )
        text = " ".join(result["text"].split())
        shown = text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 1]}…"
        mark = "✗ " if row.line in wrong else ""
        table.add_row(
            *(str(row.line), f"{mark}{result['outcome']}", row.label or "–"),
            *(", ".join(labels) or "–", shown),
        )
    console = Console()
    console.print(table, markup=False, highlight=False)
    counts = Counter(result["outcome"] for result in found)
    summary = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
    console.print(f"{len(rows)} texts: {summary}; {len(wrong)} not as expected", markup=False)
