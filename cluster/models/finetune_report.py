"""What is said of a fine-tuned classifier: its figures, a picture of its mistakes, its card.

The figures are pure functions of the confusion matrix, whose rows are the true labels.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.models.finetune_options import FinetuneOptions

PICTURE = "confusion_matrix.png"
MAX_WRITTEN = 20
"""Labels; a larger matrix is drawn without numbers in its cells."""


@dataclass(frozen=True, slots=True)
class Card:
    """What the model card says beside the figures."""

    base: str
    options: FinetuneOptions
    num_train: int


def confusion_matrix(
    truth: NDArray[np.integer[Any]], found: NDArray[np.integer[Any]], num_labels: int
) -> NDArray[np.int64]:
    """How often each true label (row) was taken for each label (column)."""
    matrix = np.zeros((num_labels, num_labels), np.int64)
    np.add.at(matrix, (truth, found), 1)
    return matrix


def accuracy(confusion: NDArray[np.int64]) -> float:
    """Share of the texts whose label is right."""
    return float(np.trace(confusion) / max(1, confusion.sum()))


def by_label(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Precision, recall and F1 of each label, [labels, 3]; 0 where there is nothing to divide."""
    right = np.diag(confusion).astype(float)
    precision = right / np.maximum(1, confusion.sum(0))
    recall = right / np.maximum(1, confusion.sum(1))
    f1 = 2 * right / np.maximum(1, confusion.sum(0) + confusion.sum(1))
    return np.stack([precision, recall, f1], axis=1)


def macro_f1(confusion: NDArray[np.int64]) -> float:
    """The mean of the labels' F1, whatever their share of the texts."""
    return float(by_label(confusion)[:, 2].mean())


def draw_confusion(confusion: NDArray[np.int64], names: Sequence[str], path: Path) -> None:
    """Write the matrix as a PNG: shares of each true label, with the counts."""
    from matplotlib.figure import Figure  # half a second to import

    shares = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    side = min(12.0, 2.2 + 0.6 * len(names))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(names))
    axes.set_xticks(ticks, [_short(name) for name in names], rotation=45, ha="right")
    axes.set_yticks(ticks, [_short(name) for name in names])
    axes.set_xlabel("found")
    axes.set_ylabel("true")
    if len(names) <= MAX_WRITTEN:
        for (row, column), count in np.ndenumerate(confusion):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color)
    figure.savefig(path, dpi=120)


def write_card(out: Path, card: Card, confusion: NDArray[np.int64]) -> None:
    """Write ``README.md``: what the model is, how good, how it was made, how it is served."""
    held_out, right = int(confusion.sum()), accuracy(confusion)
    rows = [
        f"| {_cell(name)} | {precision:.3f} | {recall:.3f} | {f1:.3f} | {count} |"
        for name, (precision, recall, f1), count in zip(
            card.options.label_names, by_label(confusion), confusion.sum(1), strict=True
        )
    ]
    settings = asdict(card.options)
    del settings["label_names"], settings["base_name"]
    text = _CARD.format(
        base=card.base,
        num_labels=len(card.options.label_names),
        num_train=card.num_train,
        held_out=held_out,
        accuracy=right,
        macro_f1=macro_f1(confusion),
        interval=1.96 * np.sqrt(right * (1 - right) / max(1, held_out)),
        picture=PICTURE,
        labels="\n".join(rows),
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _cell(name: str) -> str:
    return " ".join(name.replace("|", "\\|").split())


_CARD = """\
---
library_name: transformers
pipeline_tag: text-classification
tags: [text-classification]
---

# A classifier of texts

`{base}`, fine-tuned to give a text one of {num_labels} labels. Trained on {num_train} texts and
measured on {held_out} others, which it never saw and which decided nothing.

Accuracy **{accuracy:.3f}** (± {interval:.3f}, 95 %), macro F1 **{macro_f1:.3f}**.

| label | precision | recall | F1 | texts |
|---|---|---|---|---|
{labels}

![Which labels it confuses]({picture})

## How it was made

| setting | value |
|---|---|
{settings}

## Use

```yaml
classifiers:
  - name: mine
    model: /path/to/this/directory
```

It knows texts like those it was trained on. Its scores are probabilities only as far as they were
calibrated (`tandem models calibrate`); what it does to other kinds of texts was not measured.
"""
