"""Options shared by several commands."""

from pathlib import Path
from typing import Annotated

import typer

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", help="Ray Serve config with Tandem's settings.", show_default="ray-config.yaml"
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override one config value; repeatable."),
]
UrlOption = Annotated[
    str | None,
    typer.Option("--url", help="URL of the router.", show_default="of the running cluster"),
]
KeyOption = Annotated[
    str | None, typer.Option("--api-key", envvar="TANDEM_API_KEY", help="API key.")
]
DataOption = Annotated[
    Path, typer.Option("--data", metavar="FILE", help="CSV, TSV or JSONL file, one text per row.")
]
ModelOption = Annotated[
    str, typer.Option("--model", help="Directory of a classifier, or name of a default model.")
]
TextColumn = Annotated[str, typer.Option("--text-column", help="Column of the texts.")]
LabelColumn = Annotated[str, typer.Option("--label-column", help="Column of the labels.")]
KeyFileOption = Annotated[
    Path | None,
    typer.Option("--file", help="Key file.", show_default="from the config"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
