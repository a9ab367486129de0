"""Arguments and help of ``tandem models quantize``, ``distill`` and ``compare``."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from cluster.cli.options import (
    DataOption,
    EncodingOption,
    EpochsOption,
    HeldOutOption,
    JsonOption,
    LabelColumn,
    LearningRateOption,
    NewModelOption,
    SeedOption,
    TextColumn,
    ThreadsOption,
    TruncationOption,
)

compress_app = typer.Typer(rich_markup_mode=None)
"""Commands of ``tandem models``."""

_Model = Annotated[
    str, Argument(metavar="MODEL", help="Directory of a generator, or name of a default model.")
]
_OptionalData = Annotated[
    Path | None,
    Option(
        "--data",
        metavar="FILE",
        help="CSV, TSV or JSONL file, one text per row.",
        show_default="packaged texts",
    ),
]


@compress_app.command("quantize")
def models_quantize(
    model: _Model,
    scheme: Annotated[
        str, Option(metavar="w8a8|w4a16|fp8", help="Bits of weights (w) and activations (a).")
    ],
    out: NewModelOption,
    data: _OptionalData = None,
    text_column: TextColumn = "text",
    encoding: EncodingOption = None,
    iterations: Annotated[
        int,
        Option(min=0, help="Steps of learned rounding per layer, for w4a16; 0 is fast."),
    ] = 0,
    seed: SeedOption = 0,
) -> None:
    """Quantize a generator for vLLM's CPU and GPU kernels (needs the extra `compress`).

    The texts of --data are for w4a16: they should resemble the model's prompts and answers.
    """
    from cluster.cli.compress import quantize
    from cluster.cli.finetune import DataFile
    from cluster.models.quantize import QuantizeOptions

    file = None if data is None else DataFile(data, text_column, None, encoding)
    quantize(model, out, QuantizeOptions(scheme, iterations, seed), file)


@compress_app.command("distill")
def models_distill(
    model: Annotated[
        str, Argument(metavar="MODEL", help="Directory of a classifier, or name of a default one.")
    ],
    data: DataOption,
    layers: Annotated[int, Option(min=1, help="Layers of the new model.")],
    out: NewModelOption,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    encoding: EncodingOption = None,
    epochs: EpochsOption = 10,
    max_tokens: TruncationOption = 128,
    learning_rate: LearningRateOption = 1e-4,
    held_out: HeldOutOption = 0.1,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
) -> None:
    """Train a classifier with fewer layers to give the answers of a larger one.

    Use the file and the seed of the classifier's own training, so that the held-out texts are new
    to both.
    """
    from cluster.cli.compress import distill
    from cluster.cli.finetune import DataFile
    from cluster.models.finetune_data import FinetuneOptions

    options = FinetuneOptions(
        label_names=(),
        epochs=epochs,
        patience=2,
        max_tokens=max_tokens,
        learning_rate=learning_rate,
        frozen_layers=0,
        keep_embeddings=0.0,
        held_out=held_out,
        seed=seed,
        threads=threads,
    )
    distill(model, DataFile(data, text_column, label_column, encoding), out, layers, options)


@compress_app.command("compare")
def models_compare(
    a: Annotated[str, Argument(metavar="A", help="Directory, or name of a default model.")],
    b: Annotated[str, Argument(metavar="B", help="Another version, or the same model.")],
    data: _OptionalData = None,
    text_column: TextColumn = "text",
    encoding: EncodingOption = None,
    dtypes: Annotated[
        str | None,
        Option(
            metavar="A,B",
            help="Precisions of two classifiers, such as float32,int8.",
            show_default="float32,float32",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two generators: size, perplexity, greedy tokens, and tokens per second.

    Of classifiers: size, memory, equal answers, difference of the scores, and texts per second.
    Both models run on this machine at the same time, without a cluster.
    """
    from cluster.cli.compress import CompareOptions, compare
    from cluster.cli.finetune import DataFile

    file = None if data is None else DataFile(data, text_column, None, encoding)
    compare((a, b), CompareOptions(file, dtypes, as_json))
