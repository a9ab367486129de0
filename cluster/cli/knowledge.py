"""``tandem kb …``: knowledge bases."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from cluster.applications.knowledge.readers.detect import TYPES
from cluster.cli.router_client import RouterClient
from cluster.cli.tasks import Target, print_json, print_stream, without_none
from cluster.config.applications import KNOWLEDGE_PATH
from cluster.errors import DataError, RequestError


def create(fields: Mapping[str, Any], target: Target) -> None:
    """Create a knowledge base."""
    with target.connect() as router:
        base = router.post(KNOWLEDGE_PATH, without_none(fields))
    print(f"{base['name']}: embedded by {base['model']}, {base['passages']} passages")


def add(name: str, paths: Sequence[Path], target: Target) -> None:
    """Add files; go on after those that cannot be read.

    Raises:
        DataError: Some were not added.
    """
    failed = 0
    files = list(_files(paths))
    with target.connect() as router:
        for id_, file in files:
            try:
                _add_file(router, name, id_, file)
            except (RequestError, OSError) as error:
                failed += 1
                print(f"{id_}: not added: {getattr(error, 'strerror', None) or error}")
                if getattr(error, "status", 400) not in (400, 413):
                    raise
    if failed or not files:
        raise DataError(f"{failed} of {len(files)} files were not added")


def _add_file(router: RouterClient, name: str, id_: str, file: Path) -> None:
    with file.open("rb") as content:
        result = router.upload(_path(name, "documents"), file.name, content, {"id": id_})
    counts = ", ".join(f"{result[key]} {key}" for key in ("embedded", "kept", "removed"))
    print(f"{id_}: {counts}")


def _files(paths: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Yield id and path of each file; in directories, of those with a known ending."""
    for path in paths:
        if not path.is_dir():
            yield path.name, path
            continue
        for file in sorted(path.rglob("*")):
            if file.is_file() and file.suffix.lower() in TYPES:
                yield file.relative_to(path).as_posix(), file


def list_bases(target: Target) -> None:
    """Print the knowledge bases."""
    with target.connect() as router:
        bases = router.get(KNOWLEDGE_PATH)["data"]
    if target.as_json:
        print_json(bases)
        return
    rows = [(each["name"], each["model"], each["language"]) for each in bases]
    _print_table(("NAME", "MODEL", "LANGUAGE"), rows)


def list_documents(name: str, target: Target) -> None:
    """Print the documents of a knowledge base."""
    documents: list[Any] = []
    with target.connect() as router:
        has_more = True
        while has_more:
            query = f"?after={quote(documents[-1]['id'], safe='')}" if documents else ""
            page = router.get(_path(name, "documents") + query)
            documents += page["data"]
            has_more = page["has_more"]
    if target.as_json:
        print_json(documents)
        return
    rows = [
        (each["id"], each["type"], str(each["passages"]), str(each["bytes"])) for each in documents
    ]
    _print_table(("DOCUMENT", "TYPE", "PASSAGES", "BYTES"), rows)


def search(name: str, fields: Mapping[str, Any], target: Target) -> None:
    """Print the passages for a query."""
    with target.connect() as router:
        result = router.post(_path(name, "search"), fields)
    if target.as_json:
        print_json(result)
        return
    for passage in result["passages"]:
        print(f"{passage['relevance']:.2f}  {_place(passage)}")
        print("      " + " ".join(passage["text"].split())[:200])
    if not result["passages"]:
        print("No passages.")
    _warn(result)


def answer(name: str, fields: Mapping[str, Any], target: Target) -> None:
    """Print an answer while it is generated, and the passages that it cites."""
    body, path = without_none(fields), _path(name, "answer")
    with target.connect() as router:
        if target.as_json:
            print_json(router.post(path, body))
            return
        result = print_stream(router, path, body)
    print("" if result.get("found") else "Not in the documents.")
    for citation in result.get("citations", ()):
        print(f"[{citation['number']}] {_place(citation)}")
    _warn(result)


def remove(name: str, document: str | None, target: Target) -> None:
    """Delete a document or a knowledge base."""
    path = _path(name) if document is None else _path(name, "documents", document)
    with target.connect() as router:
        print(f"deleted {router.delete(path)['id']}")


def _warn(result: Mapping[str, Any]) -> None:
    if result.get("reranked") is False:
        print("The reranker failed; passages are in the order of the search.", file=sys.stderr)


def _path(*parts: str) -> str:
    return "/".join([KNOWLEDGE_PATH, *(quote(part) for part in parts)])


def _place(passage: Mapping[str, Any]) -> str:
    page = "" if passage["page"] is None else f", page {passage['page']}"
    heading = f", {' > '.join(passage['heading'])}" if passage["heading"] else ""
    return f"{passage['document']}:{passage['start']}-{passage['end']}{page}{heading}"


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table.grid(padding=(0, 2))
    for row in (head, *rows):
        table.add_row(*row)
    Console().print(table, markup=False, highlight=False)
