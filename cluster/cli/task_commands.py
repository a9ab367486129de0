"""Arguments and help of ``tandem tasks``."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from cluster.cli.options import JsonOption, KeyOption, UrlOption

tasks_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Translate, summarize, answer, label and extract (needs the section `applications`).",
)

FileArgument = Annotated[
    Path | None, Argument(metavar="[FILE]", help="Text file.", show_default="standard input")
]
TextsArgument = Annotated[list[str], Argument(metavar="TEXT...", help="Texts.")]
GeneratorOption = Annotated[
    str | None, Option("--model", help="Name of a generator.", show_default="the configured one")
]
ClassifierOption = Annotated[
    str | None, Option("--model", help="Name of a classifier.", show_default="the configured one")
]


@tasks_app.command()
def summarize(
    file: FileArgument = None,
    length: Annotated[
        Literal["short", "medium", "long"], Option(help="Length of the summary.")
    ] = "medium",
    style: Annotated[
        Literal["paragraph", "bullets", "headline"], Option(help="Form of the summary.")
    ] = "paragraph",
    language: Annotated[
        str | None, Option(help="Language (BCP 47).", show_default="of the text")
    ] = None,
    references: Annotated[
        bool, Option("--references", help="Print the sources of each sentence.")
    ] = False,
    model: GeneratorOption = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Summarize a text of any length."""
    from cluster.cli.tasks import Target, generate, read_text

    fields = {
        "text": read_text(file),
        "length": length,
        "style": style,
        "language": language,
        "references": references,
        "model": model,
    }
    generate("summarize", fields, Target(url, api_key, as_json))


@tasks_app.command()
def translate(
    target: Annotated[str, Option("--to", metavar="TAG", help="Target language (BCP 47).")],
    file: FileArgument = None,
    source: Annotated[
        str | None, Option("--from", metavar="TAG", help="Source.", show_default="detected")
    ] = None,
    formality: Annotated[
        Literal["default", "formal", "informal"], Option(help="Form of address.")
    ] = "default",
    markdown: Annotated[bool, Option("--markdown", help="Keep the structure of Markdown.")] = False,
    term: Annotated[
        list[str] | None,
        Option(metavar="TERM=TRANSLATION", help="Entry of the glossary; repeatable."),
    ] = None,
    model: GeneratorOption = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Translate a text by paragraph."""
    from cluster.cli.tasks import Target, generate, read_terms, read_text

    fields = {
        "text": read_text(file),
        "target": target,
        "source": source,
        "formality": formality,
        "format": "markdown" if markdown else "text",
        "glossary": read_terms(term or []),
        "model": model,
    }
    generate("translate", fields, Target(url, api_key, as_json))


@tasks_app.command()
def answer(
    question: Annotated[str, Argument(help="The question.")],
    files: Annotated[list[Path], Argument(metavar="FILE...", help="Text files to answer from.")],
    threshold: Annotated[
        float | None,
        Option(min=0, max=1, help="Relevance that a passage needs.", show_default="0.3"),
    ] = None,
    model: GeneratorOption = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question from documents, with citations."""
    from cluster.cli.tasks import Target, generate, read_text

    # Names are short, but may occur in several directories.
    has_unique_names = len({file.name for file in files}) == len(files)
    ids = [file.name if has_unique_names else str(file) for file in files]
    fields = {
        "question": question,
        "documents": [
            {"id": id_, "text": read_text(file)} for id_, file in zip(ids, files, strict=True)
        ],
        "threshold": threshold,
        "model": model,
    }
    generate("answer", fields, Target(url, api_key, as_json))


@tasks_app.command()
def sentiment(
    texts: TextsArgument,
    aspect: Annotated[list[str] | None, Option(help="Aspect of the texts; repeatable.")] = None,
    model: ClassifierOption = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the sentiment of texts, and of aspects of them."""
    from cluster.cli.tasks import Target, label

    fields = {"texts": texts, "aspects": aspect or [], "model": model}
    label("sentiment", fields, Target(url, api_key, as_json))


@tasks_app.command()
def extract(
    schema: Annotated[Path, Option("--schema", metavar="FILE", help="JSON schema of the data.")],
    file: FileArgument = None,
    instructions: Annotated[str, Option(help="Further instructions for the model.")] = "",
    model: GeneratorOption = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Extract data from a text by a JSON schema."""
    from cluster.cli.tasks import Target, extract, read_schema, read_text

    fields = {
        "text": read_text(file),
        "json_schema": read_schema(schema),
        "instructions": instructions,
        "model": model,
    }
    extract(fields, Target(url, api_key, as_json))


@tasks_app.command()
def classify(
    texts: TextsArgument,
    label: Annotated[list[str], Option(help="Label; at least two.")],
    method: Annotated[
        Literal["generator", "encoder"], Option(help="Model that compares text and labels.")
    ] = "generator",
    model: Annotated[
        str | None, Option("--model", help="Name of a model.", show_default="the configured one")
    ] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Classify texts by labels, without training."""
    from cluster.cli.tasks import Target
    from cluster.cli.tasks import label as label_texts

    fields = {"texts": texts, "labels": label, "method": method, "model": model}
    label_texts("classify", fields, Target(url, api_key, as_json))
