"""``tandem models finetune``, ``calibrate`` and ``reference``: a classifier of the user's own."""

import dataclasses
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cluster.cli.models import reported
from cluster.errors import ConfigError
from cluster.models import finetune_data
from cluster.models.finetune_data import DataError, Row
from cluster.models.finetune_options import FinetuneOptions
from cluster.models.reference import MIN_TEXTS, Reference
from cluster.models.store import Progress, resolve


@dataclass(frozen=True, slots=True)
class Data:
    """A file of texts and where in it they are."""

    path: Path
    text_column: str
    label_column: str | None

    def rows(self, at_least: int = 0) -> list[Row]:
        """Its rows; see ``read_rows``."""
        rows = finetune_data.read_rows(self.path, self.text_column, self.label_column)
        if len(rows) < at_least:
            raise DataError(f"{self.path}: got {len(rows)} rows; at least {at_least} are needed")
        return rows


def finetune(base: str | None, data: Data, out: Path, options: FinetuneOptions) -> None:
    """``tandem models finetune``: a model directory, whole or not at all.

    Args:
        base: A model directory or a default model's name; None: the packaged encoder.
        data: Texts and labels.
        out: Where the model goes.
        options: How to train; the label names come from the data.

    Raises:
        ConfigError: there is no such base, or ``out`` exists.
        DataError: the file cannot be used.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; name a new directory with --out")
    rows, console = data.rows(), Console()
    names = finetune_data.label_names(data.path, rows)
    encoder, base_name = _encoder(base)
    options = dataclasses.replace(options, label_names=names, base_name=base_name)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with reported(console) as progress:
            facts = _train(encoder, rows, scratch, options, progress)
        scratch.chmod(0o755)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _say(console, f"{out}: {facts}")
    _say(console, f"serve it as a classifier with `model: {out.absolute()}`")


def calibrate(model: str, data: Data) -> None:
    """``tandem models calibrate``: a temperature, and with it the reference of drift anew.

    Raises:
        ConfigError: there is no such model.
        DataError: the file cannot be used, or has a label that the model does not know.
    """
    from cluster.models import calibration
    from cluster.models.predict import Classifier

    rows, console = data.rows(MIN_TEXTS), Console()
    directory = _directory(model)
    classifier = Classifier.load(directory)
    truth = finetune_data.label_ids(data.path, rows, classifier.names)
    texts = [row.text for row in rows]
    with reported(console) as progress:
        logits = classifier.logits(texts, progress)
    found = calibration.calibrate(logits, truth)
    calibration.write(directory, found)
    scores = calibration.softmax(logits / found.temperature)
    Reference.of(scores, list(map(len, texts)), classifier.names).write(directory)
    _say(
        console,
        f"temperature {found.temperature:.3f}: expected calibration error "
        f"{found.ece_before:.4f} before, {found.ece_after:.4f} after, on {found.num_texts} texts",
    )


def reference(model: str, data: Data) -> None:
    """``tandem models reference``: what the model's texts look like now, to measure drift against.

    Raises:
        ConfigError: there is no such model.
        DataError: the file cannot be used.
    """
    from cluster.models.calibration import read_temperature, softmax
    from cluster.models.predict import Classifier

    rows, console = data.rows(MIN_TEXTS), Console()
    directory = _directory(model)
    classifier = Classifier.load(directory)
    texts = [row.text for row in rows]
    with reported(console) as progress:
        logits = classifier.logits(texts, progress)
    found = Reference.of(
        softmax(logits / read_temperature(directory)), list(map(len, texts)), classifier.names
    )
    found.write(directory)
    labels = ", ".join(f"{name} {count}" for name, count in found.labels.items())
    _say(console, f"the reference of {len(texts)} texts: {labels}")


def _train(
    encoder: Path, rows: list[Row], out: Path, options: FinetuneOptions, progress: Progress
) -> str:
    progress("loading PyTorch", None)
    from cluster.models.finetune import finetune as train

    texts, labels = [row.text for row in rows], [row.label for row in rows]
    metrics = train(texts, labels, encoder, out, options, progress)
    facts = dataclasses.asdict(metrics).items()
    return ", ".join(f"{name} {value}" for name, value in facts if value is not None)


def _encoder(base: str | None) -> tuple[Path, str]:
    """Where it is, and its name."""
    if base is not None:
        directory = _directory(base)
        return directory, directory.resolve().name
    from cluster.models.sentiment import ENCODER_PACKAGE, packaged_encoder

    return packaged_encoder(), ENCODER_PACKAGE


def _directory(model: str) -> Path:
    directory = Path(resolve(model))
    if not directory.is_dir():
        raise ConfigError(f"{model}: no such directory")
    return directory


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
