"""Explanations and drift statistics of the task ``classify``."""

from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from cluster.config import ClassifierConfig
from cluster.engines.classifier.explain.attribution import ExplainModel
from cluster.engines.classifier.explain.explainer import Explainer
from cluster.engines.classifier.explain.schema import ExplainOptions, Question
from cluster.engines.classifier.model.device import choose_device
from cluster.engines.classifier.model.load import LoadedModel
from cluster.engines.classifier.model.types import ModelInput, Side, num_chars
from cluster.engines.classifier.serving.drift import DriftMonitor, DriftSnapshot
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.classify import ClassifyReply, ClassifyRequest
from cluster.models.reference import Reference


class Insight:
    """Explainer and drift monitor of one classifier.

    Args:
        explainer: Computes explanations; stopped by ``stop``.
        monitor: Counts classified texts; None counts nothing.
    """

    def __init__(self, explainer: Explainer, monitor: DriftMonitor | None) -> None:
        self._explainer = explainer
        self._monitor = monitor

    @classmethod
    def for_model(cls, config: ClassifierConfig, path: str, model: LoadedModel) -> "Insight":
        """Return the explainer and monitor of ``model``, which was loaded from ``path``.

        Raises:
            ConfigError: The model's drift reference cannot be read.
        """
        device, max_tokens = choose_device(config), model.tokenizer.max_tokens
        explainer = Explainer(lambda: ExplainModel.load(path, device, max_tokens))
        labels = model.labels
        monitor = DriftMonitor(labels, Reference.read(Path(path))) if len(labels) > 1 else None
        return cls(explainer, monitor)

    async def add(
        self,
        request: ClassifyRequest,
        inputs: Sequence[ModelInput],
        encoded: Encoded,
        reply: ClassifyReply,
    ) -> ClassifyReply:
        """Count the texts, and return the reply with explanations; see ``Explainer.explain``."""
        if self._monitor is not None and request.activation_choice in (None, True):
            scores = encoded.rows_by_text(request.aggregate)
            self._monitor.observe(scores, [_num_chars(item) for item in inputs])
        if not request.explain:
            return reply
        texts = [item for item in inputs if isinstance(item, (str, tuple))]
        side: Side = "left" if request.truncate == "left" else "right"
        options = ExplainOptions() if request.explain is True else request.explain
        question = Question(options.method, request.top_k, side)
        explanations = await self._explainer.explain(texts, question)
        pairs = zip(reply.data, explanations, strict=True)
        data = [replace(item, explanation=explanation) for item, explanation in pairs]
        return replace(reply, data=data)

    def drift(self) -> DriftSnapshot | None:
        return None if self._monitor is None else self._monitor.snapshot()

    async def stop(self) -> None:
        await self._explainer.stop()


def _num_chars(item: ModelInput) -> int:
    """Return the length of a text; about four characters for each token id."""
    return num_chars(item) if isinstance(item, (str, tuple)) else 4 * len(item)
