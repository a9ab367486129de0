"""``tandem models quantize``, ``distill`` and ``compare``."""

import asyncio
import dataclasses
import json
from pathlib import Path

from rich.table import Table

from cluster.cli.finetune import DataFile, make_console, model_directory, new_directory
from cluster.cli.models import show_progress
from cluster.errors import ConfigError
from cluster.models import finetune_data
from cluster.models import quantize as quantization
from cluster.models.finetune_data import FinetuneOptions
from cluster.models.quantize import QuantizeOptions, packaged_texts, weights_bytes


def quantize(model: str, out: Path, options: QuantizeOptions, data: DataFile | None) -> None:
    """Quantize a generator; ``out`` is complete or does not exist.

    Raises:
        ConfigError: the model cannot be quantized this way, or ``out`` exists.
        DataError: the file cannot be used.
        BuildError: AutoRound is missing or fails.
    """
    directory, console = model_directory(model), make_console()
    quantization.check_quantizable(directory, out, options.scheme)
    texts = _texts(data, "calibration")
    with show_progress(console) as progress:
        progress(f"quantizing {model} to {options.scheme}", None)
        quantization.quantize(directory, out, options, texts)
    before, after = weights_bytes(directory) / 2**20, weights_bytes(out) / 2**20
    console.print(f"{out}: {options.scheme}, {after:.0f} MiB of weights instead of {before:.0f}")
    console.print(f"Compare it: tandem models compare {model} {out}")
    console.print(f"To serve it, add a generator with `model: {out.absolute()}`.")


def distill(model: str, data: DataFile, out: Path, layers: int, options: FinetuneOptions) -> None:
    """Train a smaller copy of a classifier; ``out`` is complete or does not exist.

    Raises:
        ConfigError: the model does not exist or has too few layers, or ``out`` exists.
        DataError: the file cannot be used, or has an unknown label.
    """
    from cluster.models.distill import distill as train
    from cluster.models.predict import Classifier

    teacher, rows, console = model_directory(model), data.rows(), make_console()
    if out.exists():
        raise ConfigError(f"{out} already exists; choose a new directory with --out")
    names = Classifier.load(teacher).names
    ids = finetune_data.label_ids(data.path, rows, names)
    options = dataclasses.replace(options, label_names=names, base_name=teacher.resolve().name)
    texts, labels = [row.text for row in rows], [names[label] for label in ids]
    with new_directory(out) as scratch, show_progress(console) as progress:
        found = train(texts, labels, teacher, scratch, layers, options, progress)
    ratio = found.texts_per_s / found.teacher_texts_per_s
    console.print(
        f"{out}: {found.layers} of {found.teacher_layers} layers; accuracy {found.accuracy} "
        f"(teacher {found.teacher_accuracy}) on {found.num_held_out} held-out texts, "
        f"{found.agreement:.1%} equal labels; {found.texts_per_s:.0f} texts/s (teacher "
        f"{found.teacher_texts_per_s:.0f}, {ratio:.2f} times)"
    )
    console.print(f"To serve it, add a classifier with `model: {out.absolute()}`.")


def compare(models: tuple[str, str], data: DataFile | None, *, as_json: bool) -> None:
    """Compare two generators and print the table.

    Raises:
        ConfigError: a model does not exist, is no generator, or cannot be served here.
        DataError: the file cannot be used.
    """
    from cluster.engines.comparison import compare_generators

    a, b = (model_directory(model) for model in models)
    for directory in (a, b):
        quantization.check_generator(directory)
    texts, console = _texts(data, "held_out"), make_console()
    with show_progress(make_console(stderr=True)) as progress:
        found = asyncio.run(compare_generators(models, (a, b), texts, progress))
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    table = Table("", box=None)
    for column in ("A", "B", "B / A"):
        table.add_column(column, justify="right")
    rows: list[tuple[str, float, float, str]] = [
        ("weights, MiB", found.a.size_bytes / 2**20, found.b.size_bytes / 2**20, ".0f"),
        ("perplexity", found.a.perplexity, found.b.perplexity, ".2f"),
    ]
    for count, rate in found.a.tokens_per_s.items():
        rows.append((f"tokens/s, {count} concurrent", rate, found.b.tokens_per_s[count], ".1f"))
    for name, left, right, form in rows:
        table.add_row(name, f"{left:{form}}", f"{right:{form}}", f"{right / max(left, 1e-9):.3f}")
    console.print(f"A: {found.a.model}\nB: {found.b.model}")
    console.print(table)
    console.print(f"same greedy token: {found.agreement:.1%} of {found.num_tokens} positions")


def _texts(data: DataFile | None, packaged: str) -> list[str]:
    texts = [row.text for row in data.rows(1)] if data else packaged_texts(packaged)
    if not any(text.strip() for text in texts):
        raise ConfigError("all texts are empty")
    return texts
