"""``tandem models finetune``, ``calibrate`` and ``reference``."""

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from cluster.cli.models import show_progress
from cluster.errors import ConfigError, DataError
from cluster.models import finetune_data
from cluster.models.data_file import DataRow, read_rows
from cluster.models.finetune_data import FinetuneOptions
from cluster.models.reference import MIN_TEXTS, Reference
from cluster.models.store import resolve


@dataclass(frozen=True, slots=True)
class DataFile:
    """File of texts, and the columns to read."""

    path: Path
    text_column: str
    label_column: str | None
    encoding: str | None = None

    def rows(self, minimum: int = 0) -> list[DataRow]:
        """Read the rows.

        Raises:
            DataError: the file is invalid, or has fewer than ``minimum`` rows.
        """
        rows = read_rows(self.path, self.text_column, self.label_column, self.encoding)
        if len(rows) < minimum:
            raise DataError(f"{self.path}: got {len(rows)} rows; at least {minimum} are required")
        return rows


def finetune(base: str | None, data: DataFile, out: Path, options: FinetuneOptions) -> None:
    """Fine-tune a classifier; ``out`` is complete or does not exist.

    Raises:
        ConfigError: the base does not exist, or ``out`` does.
        DataError: the file cannot be used.
    """
    if out.exists():
        raise ConfigError(f"{out} already exists; choose a new directory with --out")
    rows, console = data.rows(), make_console()
    names = finetune_data.label_names(data.path, rows)
    for group in finetune_data.similar_labels(rows):
        counts = ", ".join(f"{label!r} ({count} rows)" for label, count in group.items())
        typer.echo(
            f"warning: {data.path}: labels that differ only in case or spaces are trained as "
            f"different labels: {counts}",
            err=True,
        )
    encoder, base_name = base_encoder(base)
    options = dataclasses.replace(options, label_names=names, base_name=base_name)
    with new_directory(out) as scratch, show_progress(console) as progress:
        progress("loading PyTorch", None)
        from cluster.models.finetune import finetune as train

        texts, labels = [row.text for row in rows], [row.label for row in rows]
        metrics = dataclasses.asdict(train(texts, labels, encoder, scratch, options, progress))
    facts = [f"{name} {value}" for name, value in metrics.items() if value is not None]
    console.print(f"{out}: {', '.join(facts)}")
    console.print(f"To serve it, add a classifier with `model: {out.absolute()}`.")


def calibrate(model: str, data: DataFile) -> None:
    """Fit a model's temperature, and renew its drift reference for the calibrated scores.

    Raises:
        ConfigError: the model does not exist.
        DataError: the file cannot be used, or has an unknown label.
    """
    from cluster.models import calibration
    from cluster.models.predict import Classifier

    rows, console = data.rows(MIN_TEXTS), make_console()
    directory = model_directory(model)
    classifier = Classifier.load(directory)
    truth = finetune_data.label_ids(data.path, rows, classifier.names)
    texts = [row.text for row in rows]
    with show_progress(console) as progress:
        logits = classifier.logits(texts, progress)
    result = calibration.calibrate(logits, truth)
    calibration.write(directory, result)
    scores = calibration.softmax(logits / result.temperature)
    Reference.from_scores(scores, list(map(len, texts)), classifier.names).write(directory)
    console.print(
        f"temperature {result.temperature:.3f}; expected calibration error {result.ece_before:.4f} "
        f"before, {result.ece_after:.4f} after, on {result.num_texts} texts",
    )


def record_reference(model: str, data: DataFile) -> None:
    """Record a model's drift reference from a file of typical texts.

    Raises:
        ConfigError: the model does not exist.
        DataError: the file cannot be used.
    """
    from cluster.models.calibration import read_temperature, softmax
    from cluster.models.predict import Classifier

    rows, console = data.rows(MIN_TEXTS), make_console()
    directory = model_directory(model)
    classifier = Classifier.load(directory)
    texts = [row.text for row in rows]
    with show_progress(console) as progress:
        logits = classifier.logits(texts, progress)
    reference = Reference.from_scores(
        softmax(logits / read_temperature(directory)), list(map(len, texts)), classifier.names
    )
    reference.write(directory)
    labels = ", ".join(f"{name} {count}" for name, count in reference.labels.items())
    console.print(f"recorded a reference of {len(texts)} texts: {labels}")


def base_encoder(base: str | None) -> tuple[Path, str]:
    """Return directory and name of the encoder to fine-tune; None selects the packaged one."""
    if base is not None:
        directory = model_directory(base)
        return directory, directory.resolve().name
    from cluster.models.sentiment import ENCODER_PACKAGE, packaged_encoder

    return packaged_encoder(), ENCODER_PACKAGE


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes ``out`` if the block does not fail."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def model_directory(model: str) -> Path:
    """Return the directory of a model on this machine.

    Raises:
        ConfigError: it does not exist.
    """
    directory = Path(resolve(model))
    if not directory.is_dir():
        raise ConfigError(f"{model}: no such directory; download the model first")
    return directory


def make_console(*, stderr: bool = False) -> Console:
    """Return a console that prints texts as they are."""
    return Console(highlight=False, markup=False, soft_wrap=True, stderr=stderr)
