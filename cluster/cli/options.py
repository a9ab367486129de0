"""Options shared by several commands."""

from pathlib import Path
from typing import Annotated

from typer import Option

ConfigOption = Annotated[
    Path | None,
    Option(
        "--config", help="Ray Serve config with Tandem's settings.", show_default="ray-config.yaml"
    ),
]
SetOption = Annotated[
    list[str] | None,
    Option("--set", metavar="PATH=VALUE", help="Override one config value; repeatable."),
]
UrlOption = Annotated[
    str | None, Option("--url", help="URL of the router.", show_default="of the running cluster")
]
RemoteUrlOption = Annotated[
    str | None,
    Option("--url", help="URL of a router of the cluster.", show_default="this machine, no router"),
]
KeyOption = Annotated[str | None, Option("--api-key", envvar="TANDEM_API_KEY", help="API key.")]
DataOption = Annotated[
    Path, Option("--data", metavar="FILE", help="CSV, TSV or JSONL file, one text per row.")
]
ModelOption = Annotated[
    str, Option("--model", help="Directory of a classifier, or name of a default model.")
]
TextColumn = Annotated[str, Option("--text-column", help="Column of the texts.")]
LabelColumn = Annotated[str, Option("--label-column", help="Column of the labels.")]
EncodingOption = Annotated[
    str | None, Option("--encoding", help="Encoding of the file.", show_default="UTF-8")
]
NewModelOption = Annotated[Path, Option("--out", help="New directory for the model.")]
EpochsOption = Annotated[int, Option(min=1, help="Maximum passes over the texts.")]
TruncationOption = Annotated[
    int, Option(min=8, help="Length in tokens to which texts are truncated.")
]
LearningRateOption = Annotated[float, Option(min=1e-8, max=1.0, help="Peak learning rate.")]
HeldOutOption = Annotated[
    float, Option(min=0.01, max=0.4, help="Share of the texts used for evaluation.")
]
SeedOption = Annotated[int, Option(min=0, help="Random seed.")]
ThreadsOption = Annotated[
    int | None, Option(min=1, help="Compute threads.", show_default="one per core")
]
KeyFileOption = Annotated[
    Path | None, Option("--file", help="Key file.", show_default="from the config")
]
JsonOption = Annotated[bool, Option("--json", help="Print JSON.")]
