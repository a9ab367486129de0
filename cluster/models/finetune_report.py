"""Report of a fine-tuned classifier: metrics, confusion matrix and model card.

Metrics are functions of the confusion matrix, whose rows are the true labels.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.models.finetune_data import FinetuneOptions

PICTURE = "confusion_matrix.png"
MAX_NUMBERED_LABELS = 20  # larger matrices are drawn without numbers in the cells


def confusion_matrix(
    truth: NDArray[np.integer[Any]], predicted: NDArray[np.integer[Any]], num_labels: int
) -> NDArray[np.int64]:
    """Count the texts by true label (row) and predicted label (column), [labels, labels]."""
    matrix = np.zeros((num_labels, num_labels), np.int64)
    np.add.at(matrix, (truth, predicted), 1)
    return matrix


def accuracy(confusion: NDArray[np.int64]) -> float:
    return float(np.trace(confusion) / max(1, confusion.sum()))


def metrics_by_label(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return precision, recall and F1 of each label, [labels, 3]; undefined values are 0."""
    correct = np.diag(confusion).astype(float)
    precision = correct / np.maximum(1, confusion.sum(0))
    recall = correct / np.maximum(1, confusion.sum(1))
    f1 = 2 * correct / np.maximum(1, confusion.sum(0) + confusion.sum(1))
    return np.stack([precision, recall, f1], axis=1)


def macro_f1(confusion: NDArray[np.int64]) -> float:
    return float(metrics_by_label(confusion)[:, 2].mean())


def draw_confusion(confusion: NDArray[np.int64], names: Sequence[str], path: Path) -> None:
    from matplotlib.figure import Figure  # takes 0.5 s to import

    shares = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    side = min(12.0, 2.2 + 0.6 * len(names))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(names))
    axes.set_xticks(ticks, [_short(name) for name in names], rotation=45, ha="right")
    axes.set_yticks(ticks, [_short(name) for name in names])
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(names) <= MAX_NUMBERED_LABELS:
        for (row, column), count in np.ndenumerate(confusion):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color)
    figure.savefig(path, dpi=120)


def write_card(
    out: Path, base: str, options: FinetuneOptions, num_train: int, confusion: NDArray[np.int64]
) -> None:
    held_out, share = int(confusion.sum()), accuracy(confusion)
    rows = [
        f"| {_cell(name)} | {precision:.3f} | {recall:.3f} | {f1:.3f} | {count} |"
        for name, (precision, recall, f1), count in zip(
            options.label_names, metrics_by_label(confusion), confusion.sum(1), strict=True
        )
    ]
    settings = asdict(options)
    del settings["label_names"], settings["base_name"]
    text = _CARD.format(
        base=base,
        num_labels=len(options.label_names),
        num_train=num_train,
        held_out=held_out,
        accuracy=share,
        macro_f1=macro_f1(confusion),
        interval=1.96 * np.sqrt(share * (1 - share) / max(1, held_out)),
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

# Text classifier

`{base}`, fine-tuned to classify texts into {num_labels} labels. Trained on {num_train} texts and
evaluated on {held_out} held-out texts that were not used for training or model selection.

Accuracy **{accuracy:.3f}** (± {interval:.3f}, 95 % CI), macro F1 **{macro_f1:.3f}**.

| label | precision | recall | F1 | texts |
|---|---|---|---|---|
{labels}

![Confusion matrix]({picture})

## Training

| setting | value |
|---|---|
{settings}

## Use

```yaml
classifiers:
  - name: mine
    model: /path/to/this/directory
```

The metrics hold for texts similar to the training data. Scores are reliable probabilities only
after calibration (`tandem models calibrate`).
"""
