"""In which numbers a model computes, and the proof that they give its float32 answers.

A model in low precision is compared with itself in float32 when it is first loaded, on its own
held-out texts or on ours (``check_texts``). What came out is kept under the Tandem home, by model,
precision and PyTorch, and is not measured again. Runs on the model thread.
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

from cluster.config import ClassifierConfig, ClassifierTask
from cluster.engines.classifier.model.types import Rows, TokenIds
from cluster.errors import ConfigError
from cluster.models.store import home

log = logging.getLogger(__name__)

MIN_AGREEMENT = 0.995
MIN_COSINE = 0.99
BATCH_TEXTS = 32
RECIPE = "3"
"""Changes when the low-precision arithmetic or the comparison does, so that agreement is measured
anew."""

Run = Callable[[ClassifierTask, Sequence[TokenIds]], Any]
"""See ``EncoderModel.run``."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often the low-precision model answers as the float32 one does."""

    share: float
    """Of texts or tokens with the same label (or all of several), of masks with the same best
    token, of numbers within 2 % of their spread, of embeddings with a cosine of at least 0.99."""
    answers: int
    """That were compared."""

    @property
    def suffices(self) -> bool:
        """Whether the low precision may be used."""
        return self.share >= MIN_AGREEMENT

    def __str__(self) -> str:
        """For people."""
        return f"agrees with float32 on {self.share:.2%} of {self.answers} answers"


def require(config: ClassifierConfig, agreement: Agreement, precision: str) -> None:
    """Log the agreement.

    Raises:
        ConfigError: it is too low.
    """
    found = f"{precision} {agreement}"
    if not agreement.suffices:
        raise ConfigError(
            f"classifiers.{config.name}.dtype: {found}; at least {MIN_AGREEMENT:.1%} is wanted: "
            "take a higher precision"
        )
    log.info("%s: %s", config.name, found)


def measure(
    head: ClassifierTask,
    low: Run,
    full: Run,
    ids: Sequence[TokenIds],
    problem_type: str | None = None,
) -> Agreement:
    """Run ``ids`` through both; for ``fill-mask`` there is a mask in them.

    Args:
        head: What is computed.
        low: In low precision.
        full: In float32.
        ids: The texts.
        problem_type: That of the network's configuration.
    """
    runs = [(low(head, batch), full(head, batch)) for batch in batches(ids)]
    found, wanted = (np.concatenate([_rows(run[i]) for run in runs]) for i in (0, 1))
    same = _same(head, problem_type, found, wanted)
    return Agreement(float(np.mean(same)), len(same))


def batches(ids: Sequence[TokenIds]) -> list[list[TokenIds]]:
    """``ids`` in ascending order of length, some at a time."""
    ordered = sorted(ids, key=len)
    return [ordered[i : i + BATCH_TEXTS] for i in range(0, len(ordered), BATCH_TEXTS)]


def _rows(result: Rows | list[Rows]) -> Rows:
    return np.concatenate(result) if isinstance(result, list) else result


def _same(head: ClassifierTask, problem_type: str | None, found: Rows, wanted: Rows) -> Any:
    if head == "fill-mask":  # the ids come first, the best one's before the others'
        return found[:, 0] == wanted[:, 0]
    if head == "embed":
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
        return (found * wanted).sum(1) >= MIN_COSINE * lengths
    if problem_type == "regression" or wanted.shape[1] == 1:
        # Numbers, whatever their range: near enough not to change an order.
        spread = np.maximum(1e-6, np.ptp(wanted, axis=0))
        return (np.abs(found - wanted) <= 0.02 * spread).all(1)
    if problem_type == "multi_label_classification":
        return ((found >= 0.5) == (wanted >= 0.5)).all(1)
    return found.argmax(1) == wanted.argmax(1)


class AgreementStore:
    """The agreements that were measured before, a small file for each.

    Args:
        path: The model's directory.
        parts: What else the agreement depends on.
    """

    def __init__(self, path: str, *parts: object) -> None:
        files = sorted(Path(path).glob("*.safetensors")) + sorted(Path(path).glob("*.json*"))
        facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        machine = torch.__version__, torch.backends.cpu.get_cpu_capability()
        key = repr((RECIPE, str(Path(path).absolute()), facts, machine, parts))
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        self._file = home() / "agreement" / f"{Path(path).name}-{digest}.json"

    def read(self) -> Agreement | None:
        """What was measured; None if nothing was, or the file cannot be read."""
        try:
            return Agreement(**json.loads(self._file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, agreement: Agreement) -> None:
        """Keep it; a home that cannot be written only means that it is measured again."""
        fields = asdict(agreement)
        fresh = self._file.with_suffix(f".{id(self)}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(fields) + "\n", encoding="utf-8")
            fresh.replace(self._file)
        except OSError as error:
            log.warning("the agreement cannot be kept: %s", error)
