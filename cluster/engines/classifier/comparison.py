"""Comparison of two classifiers, or of two precisions of one, on the same texts."""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import Module

from cluster.config import ClassifierConfig
from cluster.engines.classifier.model.agreement import (
    batches_by_length,
    cosines,
    equal_answers,
    indexes_by_length,
)
from cluster.engines.classifier.model.build import ModelBuilder, computed_heads
from cluster.engines.classifier.model.load import make_builder
from cluster.engines.classifier.model.types import EncoderModel, Head, Rows, TokenIds
from cluster.errors import ConfigError
from cluster.models.quantize import architecture_name, weights_bytes
from cluster.models.store import Progress

DTYPES = ("float32", "bfloat16", "float16", "int8")
NUM_ROUNDS = 5
RATE_TEXTS = 400
"""Texts of a round; more are thinned out evenly."""
_TASKS = {
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "embed",
    "Model": "embed",
}
"""Compared task by the end of the architecture's name."""


@dataclass(frozen=True, slots=True)
class Version:
    """One of the compared classifiers."""

    model: str
    directory: Path
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class ClassifierFigures:
    """Figures of one of the classifiers."""

    model: str
    dtype: str
    size_bytes: int
    """Size of the weight files; low precisions are made from them when the model is loaded."""
    memory_bytes: int
    """Size of the weights in memory."""
    texts_per_s: float
    """Median over the rounds, which alternate between both."""


@dataclass(frozen=True, slots=True)
class ClassifierComparison:
    """Result of comparing two classifiers."""

    a: ClassifierFigures
    b: ClassifierFigures
    num_answers: int
    """Compared texts, or tokens if the models label tokens."""
    agreement: float
    """Share of equal answers, as ``Agreement.share``."""
    difference: float
    """Mean absolute difference of a score; of embeddings, mean of 1 - cosine."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A classifier that is loaded, and its input rows."""

    version: Version
    builder: ModelBuilder
    ids: list[TokenIds]

    @property
    def head(self) -> Head:
        (head,) = computed_heads(self.builder.config)
        return head

    @property
    def labels(self) -> list[str]:
        names = self.builder.network.config.id2label
        return [] if self.head == "embed" else [str(names[key]) for key in sorted(names)]

    @property
    def problem_type(self) -> str:
        """Kind of the labels' scores; transformers' default if none is set."""
        return str(self.builder.network.config.problem_type or "single_label_classification")

    def figures(self, model: EncoderModel, rates: Sequence[float]) -> ClassifierFigures:
        return ClassifierFigures(
            self.version.model,
            self.version.dtype,
            weights_bytes(self.version.directory),
            tensor_bytes(model),
            statistics.median(rates),
        )


def compare_classifiers(
    a: Version, b: Version, texts: Sequence[str], progress: Progress
) -> ClassifierComparison:
    """Load both classifiers and compare them on the texts; long ones are cut.

    Raises:
        ConfigError: a precision is unknown or not available here, a model cannot be loaded, or
            the answers of the two cannot be compared.
    """
    candidates = _load(a, texts), _load(b, texts)
    _check_comparable(*candidates)
    head = candidates[0].head
    models = []
    for each in candidates:
        progress(f"making {each.version.model} in {each.version.dtype}", None)
        models.append(each.builder.build_unchecked(each.version.dtype))
    progress("comparing the answers", None)
    one, other = (
        _answers(model, head, each.ids) for model, each in zip(models, candidates, strict=True)
    )
    if one.shape != other.shape:
        raise ConfigError(f"{a.model} and {b.model} have embeddings of different sizes")
    equal = equal_answers(head, candidates[0].problem_type, other, one)
    differences = 1 - cosines(other, one) if head == "embed" else np.abs(other - one)
    rates: tuple[list[float], list[float]] = [], []
    for index in range(NUM_ROUNDS):
        progress("measuring the rate", index / NUM_ROUNDS)
        for model, each, found in zip(models, candidates, rates, strict=True):
            found.append(_measure_rate(model, head, each.ids))
    figures = [
        each.figures(model, found)
        for each, model, found in zip(candidates, models, rates, strict=True)
    ]
    return ClassifierComparison(
        figures[0], figures[1], len(one), float(np.mean(equal)), float(np.mean(differences))
    )


def tensor_bytes(model: object) -> int:
    """Return the size of all tensors of a model, each counted once."""
    tensors = {id(tensor): tensor for tensor in _tensors(model)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _load(version: Version, texts: Sequence[str]) -> Candidate:
    if version.dtype not in DTYPES:
        raise ConfigError(f"dtype: got {version.dtype!r}; allowed: {', '.join(DTYPES)}")
    name = architecture_name(version.directory)
    task = next((task for suffix, task in _TASKS.items() if name.endswith(suffix)), None)
    if task is None:
        suffixes = ", ".join(f"*{suffix}" for suffix in _TASKS)
        raise ConfigError(f"{version.model} is a {name}; encoders ({suffixes}) can be compared")
    path = str(version.directory)
    config = ClassifierConfig.model_validate({"name": "compared", "model": path, "tasks": [task]})
    builder = make_builder(config, path)
    return Candidate(version, builder, builder.tokenizer.encode(list(texts), 0, "right"))


def _check_comparable(a: Candidate, b: Candidate) -> None:
    """Raise ``ConfigError`` unless both give answers of the same kind to the same inputs."""
    names = f"{a.version.model} and {b.version.model}"
    if a.head != b.head:
        raise ConfigError(f"{names} have different tasks: {a.head} and {b.head}")
    if a.labels != b.labels:
        raise ConfigError(
            f"{names} have different labels: {', '.join(a.labels)} and {', '.join(b.labels)}"
        )
    if a.head == "classify" and a.problem_type != b.problem_type:
        raise ConfigError(
            f"{names} have different problem types: {a.problem_type} and {b.problem_type}"
        )
    same = all(map(np.array_equal, a.ids, b.ids))
    if a.head == "token-classification" and not same:
        raise ConfigError(f"{names} have different tokenizers, so their tokens cannot be compared")


def _answers(model: EncoderModel, head: Head, ids: Sequence[TokenIds]) -> Rows:
    """Return the answers in the order of the texts, [texts or tokens, labels or width]."""
    rows: dict[int, Rows] = {}
    for chosen in indexes_by_length(ids):
        found = model.run(head, [ids[index] for index in chosen])
        rows.update(zip(chosen, map(np.atleast_2d, found), strict=True))
    return np.concatenate([rows[index] for index in range(len(ids))])


def _measure_rate(model: EncoderModel, head: Head, ids: Sequence[TokenIds]) -> float:
    """Return texts per second."""
    chosen = ids[:: math.ceil(len(ids) / RATE_TEXTS)]
    batches = batches_by_length(chosen)
    started = time.perf_counter()
    for batch in batches:
        model.run(head, batch)
    return len(chosen) / (time.perf_counter() - started)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Module):
        parts = [*value.parameters(), *value.buffers()]
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif not type(value).__module__.startswith("cluster."):
        return
    elif is_dataclass(value):
        parts = [getattr(value, field.name) for field in fields(value)]
    else:
        parts = list(vars(value).values())
    for part in parts:
        yield from _tensors(part)
