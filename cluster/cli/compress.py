"""``tandem models quantize``, ``distill`` and ``compare``."""

import asyncio
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cluster.cli.finetune import DataFile, make_console, model_directory, new_directory
from cluster.cli.models import show_progress
from cluster.errors import ConfigError
from cluster.models import finetune_data
from cluster.models import quantize as quantization
from cluster.models.finetune_data import FinetuneOptions
from cluster.models.quantize import QuantizeOptions, packaged_texts, weights_bytes
from cluster.models.store import Progress

if TYPE_CHECKING:
    from cluster.engines.comparison import ModelFigures

Row = tuple[str, str, str, float]
"""Figure of both models: its name, the values, and the second as a multiple of the first."""


def quantize(model: str, out: Path, options: QuantizeOptions, data: DataFile | None) -> None:
    """Quantize a generator; ``out`` is complete or does not exist.

    Raises:
        ConfigError: the model cannot be quantized this way, or ``out`` exists.
        DataError: the file cannot be used.
        BuildError: AutoRound is missing or fails.
    """
    directory, console = model_directory(model), make_console()
    quantization.check_quantizable(directory, out, options.scheme)
    texts = _texts(data, partial(packaged_texts, "calibration"))
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


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """Options of ``compare``."""

    data: DataFile | None = None
    """Texts; None: those that come with Tandem or with the first classifier."""
    dtypes: str | None = None
    """Precisions of two classifiers, separated by a comma; None: float32 of both."""
    as_json: bool = False


def compare(models: tuple[str, str], options: CompareOptions) -> None:
    """Compare two generators or two classifiers, and print the table.

    Raises:
        ConfigError: a model does not exist or cannot run here, or they cannot be compared.
        DataError: the file cannot be used.
    """
    a, b = (model_directory(model) for model in models)
    kinds = [quantization.is_generator(directory) for directory in (a, b)]
    if kinds[0] != kinds[1]:
        raise ConfigError(f"{models[kinds.index(True)]} is a generator and the other model is not")
    if kinds[0] and options.dtypes is not None:
        raise ConfigError("--dtypes is for classifiers; quantize a generator to compare it")
    work = _compare_generators if kinds[0] else _compare_classifiers
    with show_progress(make_console(stderr=True)) as progress:
        found, rows, summary = work(models, (a, b), options, progress)
    if options.as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    table, console = Table("", box=None), make_console()
    for column in ("A", "B", "B / A"):
        table.add_column(column, justify="right")
    for name, left, right, ratio in rows:
        table.add_row(name, left, right, f"{ratio:.3f}")
    console.print(f"A: {models[0]}\nB: {models[1]}")
    console.print(table)
    console.print(summary)


def _compare_generators(
    models: tuple[str, str],
    directories: tuple[Path, Path],
    options: CompareOptions,
    progress: Progress,
) -> tuple[Any, list[Row], str]:
    from cluster.engines.comparison import compare_generators

    texts = _texts(options.data, partial(packaged_texts, "held_out"))
    found = asyncio.run(compare_generators(models, directories, texts, progress))
    rows = [
        _row("weights, MiB", found.a.size_bytes / 2**20, found.b.size_bytes / 2**20, ".0f"),
        _row("perplexity", found.a.perplexity, found.b.perplexity, ".2f"),
    ]
    for count, rate in found.a.tokens_per_s.items():
        name, ratio = f"tokens/s, {count} concurrent", found.b.tokens_per_s[count] / rate
        rows.append((name, _rate(found.a, count), _rate(found.b, count), ratio))
    summary = f"same greedy token: {found.agreement:.1%} of {found.num_tokens} positions"
    return found, rows, summary


def _compare_classifiers(
    models: tuple[str, str],
    directories: tuple[Path, Path],
    options: CompareOptions,
    progress: Progress,
) -> tuple[Any, list[Row], str]:
    dtypes = (options.dtypes or "float32,float32").split(",")
    if len(dtypes) != len(models):
        raise ConfigError(f"--dtypes: got {options.dtypes!r}; write two, such as float32,int8")
    progress("loading PyTorch", None)
    from cluster.engines.classifier.comparison import Version, compare_classifiers
    from cluster.engines.classifier.model.check_texts import check_texts

    texts = _texts(options.data, partial(check_texts, str(directories[0])))
    a, b = map(Version, models, directories, map(str.strip, dtypes))
    found = compare_classifiers(a, b, texts, progress)
    rows = [
        _row("weights, MiB", found.a.size_bytes / 2**20, found.b.size_bytes / 2**20, ".1f"),
        _row("memory, MiB", found.a.memory_bytes / 2**20, found.b.memory_bytes / 2**20, ".1f"),
        _row("texts/s", found.a.texts_per_s, found.b.texts_per_s, ".1f"),
    ]
    summary = (
        f"{found.a.dtype} and {found.b.dtype}: {found.agreement:.2%} of {found.num_answers} "
        f"answers equal, mean difference of a score {found.difference:.4f}"
    )
    return found, rows, summary


def _row(name: str, left: float, right: float, form: str) -> Row:
    return name, f"{left:{form}}", f"{right:{form}}", right / max(left, 1e-9)


def _rate(figures: "ModelFigures", count: int) -> str:
    slowest, fastest = figures.tokens_per_s_range[count]
    return f"{figures.tokens_per_s[count]:.1f} ({slowest:.1f}-{fastest:.1f})"


def _texts(data: DataFile | None, default: Callable[[], list[str]]) -> list[str]:
    texts = [row.text for row in data.rows(1)] if data else default()
    if not any(text.strip() for text in texts):
        raise ConfigError("all texts are empty")
    return texts
