"""Arguments and help of ``tandem kb``."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from cluster.cli.options import JsonOption, KeyOption, UrlOption

knowledge_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Search documents and answer from them (needs the section `applications`).",
)

_Name = Annotated[str, Argument(metavar="NAME", help="Name of the knowledge base.")]
_Mode = Annotated[
    Literal["hybrid", "text", "vector"], Option(help="Search by words, by meaning, or by both.")
]


@knowledge_app.command()
def create(
    name: _Name,
    model: Annotated[
        str | None,
        Option("--model", help="Classifier that embeds texts.", show_default="the configured one"),
    ] = None,
    chunk_tokens: Annotated[
        int | None, Option(help="Longest passage, in tokens.", show_default="the configured one")
    ] = None,
    language: Annotated[
        str, Option(help="Language of the word search; `none` for other ones.")
    ] = "English",
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Create a knowledge base."""
    from cluster.cli.knowledge import create
    from cluster.cli.tasks import Target

    fields = {"name": name, "model": model, "chunk_tokens": chunk_tokens, "language": language}
    create(fields, Target(url, api_key))


@knowledge_app.command()
def add(
    name: _Name,
    paths: Annotated[
        list[Path], Argument(metavar="PATH...", help="Files, and directories with such files.")
    ],
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Add text, Markdown, HTML, PDF and DOCX files; known ones are updated."""
    from cluster.cli.knowledge import add
    from cluster.cli.tasks import Target

    add(name, paths, Target(url, api_key))


@knowledge_app.command("list")
def list_(
    name: Annotated[
        str | None, Argument(metavar="[NAME]", help="List its documents.", show_default="all bases")
    ] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the knowledge bases, or the documents of one."""
    from cluster.cli.knowledge import list_bases, list_documents
    from cluster.cli.tasks import Target

    target = Target(url, api_key, as_json)
    if name is None:
        list_bases(target)
    else:
        list_documents(name, target)


@knowledge_app.command()
def search(
    name: _Name,
    query: Annotated[str, Argument(help="Words or a question.")],
    limit: Annotated[int, Option(min=1, max=100, help="Number of passages.")] = 5,
    mode: _Mode = "hybrid",
    url: UrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find passages."""
    from cluster.cli.knowledge import search
    from cluster.cli.tasks import Target

    fields = {"query": query, "limit": limit, "mode": mode}
    search(name, fields, Target(url, api_key, as_json))


@knowledge_app.command()
def answer(
    name: _Name,
    question: Annotated[str, Argument(help="The question.")],
    threshold: Annotated[
        float | None,
        Option(
            min=0, max=1, help="Relevance that a passage needs.", show_default="the configured one"
        ),
    ] = None,
    model: Annotated[
        str | None,
        Option("--model", help="Name of a generator.", show_default="the configured one"),
    ] = None,
    max_tokens: Annotated[
        int | None, Option(min=1, help="Longest answer, in tokens.", show_default="300")
    ] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question, with citations."""
    from cluster.cli.knowledge import answer
    from cluster.cli.tasks import Target

    fields = {
        "question": question,
        "threshold": threshold,
        "model": model,
        "max_tokens": max_tokens,
    }
    answer(name, fields, Target(url, api_key, as_json))


@knowledge_app.command()
def remove(
    name: _Name,
    document: Annotated[
        str | None,
        Argument(metavar="[DOCUMENT]", help="Id of a document.", show_default="the whole base"),
    ] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Delete a document, or a knowledge base with all documents."""
    from cluster.cli.knowledge import remove
    from cluster.cli.tasks import Target

    remove(name, document, Target(url, api_key))
