"""``tandem tasks …``: typed tasks."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from cluster.cli.defaults import router_url
from cluster.cli.router_client import RouterClient, connect
from cluster.config.applications import TASK_PREFIX
from cluster.errors import DataError


class Target(NamedTuple):
    """Router of a command, and the form of its output."""

    url: str | None
    key: str | None
    as_json: bool = False

    def connect(self) -> AbstractContextManager[RouterClient]:
        return connect(router_url(self.url), self.key)


def read_text(file: Path | None) -> str:
    """Return the text of a file, or of the standard input without one.

    Raises:
        DataError: The file cannot be read, or is not UTF-8.
    """
    try:
        if file is None or str(file) == "-":
            return sys.stdin.read()
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}") from None


def read_schema(file: Path) -> Any:
    """Return the JSON of a file; raises as ``read_text`` does."""
    try:
        return json.loads(read_text(file))
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}") from None


def read_terms(terms: Sequence[str]) -> dict[str, str]:
    """Return the glossary in arguments such as ``kernel=Kern``."""
    pairs = [term.partition("=") for term in terms]
    if wrong := [term for term, equals, translation in pairs if not (term and translation)]:
        raise DataError(f"--term {wrong[0]}: expected TERM=TRANSLATION")
    return {term: translation for term, _, translation in pairs}


def generate(task: str, fields: Mapping[str, Any], target: Target) -> None:
    """Run a task that generates text, and print the text as it arrives."""
    body = without_none(fields)
    if target.as_json:
        print_json(_post(task, body, target))
        return
    with target.connect() as router:
        result = print_stream(router, TASK_PREFIX + task, body)
    print()
    if result.get("found") is False:
        print("Not in the documents.")
    for citation in result.get("citations", ()):
        place = f"{citation['document']}:{citation['start']}-{citation['end']}"
        print(f"[{citation['number']}] {place}")
    if result.get("sentences"):
        _print_references(result["sentences"])


def label(task: str, fields: Mapping[str, Any], target: Target) -> None:
    """Run a task that labels texts, and print a table."""
    answer = _post(task, without_none(fields), target)
    if target.as_json:
        print_json(answer)
        return
    table = Table.grid(padding=(0, 2))
    for text, row in zip(fields["texts"], answer["results"], strict=True):
        aspects = " ".join(f"{name}={value}" for name, value in row.get("aspects", {}).items())
        table.add_row(row["label"], f"{row['score']:.3f}", aspects, text)
    Console().print(table, markup=False, highlight=False)


def extract(fields: Mapping[str, Any], target: Target) -> None:
    """Extract data, and print it as JSON; the whole result with ``--json``."""
    answer = _post("extract", without_none(fields), target)
    print_json(answer if target.as_json else answer["data"])


def _post(task: str, body: Mapping[str, Any], target: Target) -> Any:
    with target.connect() as router:
        return router.post(TASK_PREFIX + task, body)


def print_stream(router: RouterClient, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Print a text while it is generated; return the result at its end."""
    result: Mapping[str, Any] = {}
    for event in router.events(path, {**body, "stream": True}):
        print(event.get("delta", ""), end="", flush=True)
        result = event.get("result", result)
    return result


def without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _print_references(sentences: Sequence[Mapping[str, Any]]) -> None:
    for sentence in sentences:
        places = [f"{each['start']}-{each['end']}" for each in sentence["references"]]
        print(f"{', '.join(places) or 'no source':>24}  {sentence['text']}")
