"""Agreement of a low-precision model with its float32 original.

The agreement is measured when a model is first loaded, on its own held-out texts or on generated
ones (``check_texts``). The result is saved in the Tandem home by model, precision and PyTorch
version, and reused.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.config import ClassifierConfig
from cluster.engines.classifier.model.types import Head, Rows, TokenIds
from cluster.errors import ConfigError
from cluster.models.store import home

log = logging.getLogger(__name__)

MIN_AGREEMENT = 0.995
"""Smallest share of equal answers at which a low precision is used."""
MIN_COSINE = 0.99
"""Cosine from which two embeddings count as equal."""
MAX_DEVIATION = 0.02
"""Difference up to which two numbers count as equal, as a share of the numbers' spread."""
BATCH_TEXTS = 32
RECIPE = "4"
"""Version of the low-precision arithmetic and of the comparison. A change makes saved agreements
invalid."""

Run = Callable[[Head, Sequence[TokenIds]], Any]
"""See ``EncoderModel.run``."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Result of comparing a low-precision model with float32."""

    share: float
    """Share of equal answers. Equal are texts or tokens with the same label (or the same set of
    labels), masks with the same best token, numbers within 2 % of their spread, and embeddings with
    a cosine of at least 0.99."""
    answers: int
    """Number of compared answers."""

    @property
    def suffices(self) -> bool:
        return self.share >= MIN_AGREEMENT

    def __str__(self) -> str:
        return f"agrees with float32 on {self.share:.2%} of {self.answers} answers"


def require_agreement(config: ClassifierConfig, agreement: Agreement, precision: str) -> None:
    """Log the agreement, or raise ``ConfigError`` if it is too low."""
    result = f"{precision} {agreement}"
    if not agreement.suffices:
        raise ConfigError(
            f"classifiers.{config.name}.dtype: {result}; the minimum is {MIN_AGREEMENT:.1%}. "
            "Use a higher precision."
        )
    log.info("%s: %s", config.name, result)


def measure_agreement(
    head: Head,
    low: Run,
    full: Run,
    ids: Sequence[TokenIds],
    problem_type: str | None = None,
) -> Agreement:
    """Compare a low-precision model with the full one; for ``fill-mask``, each row has a mask."""
    runs = [(low(head, batch), full(head, batch)) for batch in batches_by_length(ids)]
    found, wanted = (np.concatenate([_as_array(run[i]) for run in runs]) for i in (0, 1))
    equal = equal_answers(head, problem_type, found, wanted)
    return Agreement(float(np.mean(equal)), len(equal))


def batches_by_length(ids: Sequence[TokenIds]) -> list[list[TokenIds]]:
    return [[ids[index] for index in batch] for batch in indexes_by_length(ids)]


def indexes_by_length(ids: Sequence[TokenIds]) -> list[list[int]]:
    """Return the positions of the rows of each batch of ``batches_by_length``."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    return [order[i : i + BATCH_TEXTS] for i in range(0, len(order), BATCH_TEXTS)]


def _as_array(result: Rows | list[Rows]) -> Rows:
    return np.concatenate(result) if isinstance(result, list) else result


def equal_answers(head: Head, problem_type: str | None, found: Rows, wanted: Rows) -> Any:
    """Return True for each row of equal answers; see ``Agreement.share``."""
    if head == "fill-mask":  # the first column is the id of the best token
        return found[:, 0] == wanted[:, 0]
    if head == "embed":
        return cosines(found, wanted) >= MIN_COSINE
    if problem_type == "regression" or wanted.shape[1] == 1:
        # The range of numbers is unknown; what matters is that they keep their order.
        spread = np.maximum(1e-6, np.ptp(wanted, axis=0))
        return (np.abs(found - wanted) <= MAX_DEVIATION * spread).all(1)
    if problem_type == "multi_label_classification":
        return ((found >= 0.5) == (wanted >= 0.5)).all(1)
    return found.argmax(1) == wanted.argmax(1)


def cosines(found: Rows, wanted: Rows) -> Rows:
    """Return the cosine of each pair of rows; 1 for two rows of zeros."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    result: Rows = (found == wanted).all(1).astype(np.float32)
    np.divide((found * wanted).sum(1), lengths, out=result, where=lengths > 0)
    return result


class AgreementStore:
    """Saved agreement of one model in one setting.

    Args:
        path: The model's directory.
        settings: Everything else that the agreement depends on.
    """

    def __init__(self, path: str, *settings: object) -> None:
        files = sorted(Path(path).glob("*.safetensors")) + sorted(Path(path).glob("*.json*"))
        facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        machine = torch.__version__, torch.backends.cpu.get_cpu_capability()
        key = repr((RECIPE, str(Path(path).resolve()), facts, machine, settings))
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        self._file = home() / "agreement" / f"{Path(path).name}-{digest}.json"

    def read(self) -> Agreement | None:
        try:
            return Agreement(**json.loads(self._file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, agreement: Agreement) -> None:
        temporary = self._file.with_suffix(f".{id(self)}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(asdict(agreement)) + "\n", encoding="utf-8")
            temporary.replace(self._file)
        except OSError as error:
            log.warning("cannot save the agreement, it will be measured again: %s", error)
