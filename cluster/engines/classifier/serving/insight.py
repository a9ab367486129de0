"""What a classifier says beside its labels: why a text has them, and whether the texts change.

Both belong to the task ``classify`` alone. Owns the explainer and the drift monitor of an engine.
"""

from pathlib import Path

from msgspec.structs import replace

from cluster.config import ClassifierConfig
from cluster.engines.classifier.explain.attribution import ExplainModel
from cluster.engines.classifier.explain.explainer import Explainer
from cluster.engines.classifier.explain.schema import question
from cluster.engines.classifier.model.device import choose_device
from cluster.engines.classifier.model.load import LoadedModel
from cluster.engines.classifier.model.template import Side
from cluster.engines.classifier.model.types import num_chars
from cluster.engines.classifier.serving.drift import DriftMonitor, DriftSnapshot
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.classify import ClassifyReply, ClassifyRequest
from cluster.engines.classifier.serving.texts import to_texts
from cluster.models.reference import Reference


class Insight:
    """Watches and explains the answers of one classifier.

    Args:
        explainer: Explains; owned from now on.
        monitor: Counts what was answered; None: nothing is counted.
    """

    def __init__(self, explainer: Explainer, monitor: DriftMonitor | None) -> None:
        self._explainer = explainer
        self._monitor = monitor

    @classmethod
    def of(cls, config: ClassifierConfig, path: str, model: LoadedModel) -> "Insight":
        """That of the model directory ``path``, which is loaded as ``model``.

        Raises:
            ConfigError: its drift reference cannot be read.
        """
        device, max_tokens = choose_device(config), model.tokenizer.max_tokens
        explainer = Explainer(lambda: ExplainModel.load(path, device, max_tokens))
        labels = model.labels
        monitor = DriftMonitor(labels, Reference.read(Path(path))) if len(labels) > 1 else None
        return cls(explainer, monitor)

    async def add(
        self, request: ClassifyRequest, encoded: Encoded, reply: ClassifyReply
    ) -> ClassifyReply:
        """Note an answer, and give it with the explanations that the request asked for.

        Raises:
            RequestError: see ``Explainer.explain``.
        """
        texts = to_texts(request.input)
        if self._monitor is not None:
            rows = encoded.rows_by_text(request.aggregate)
            self._monitor.observe(rows, list(map(num_chars, texts)))
        side: Side = "left" if request.truncate == "left" else "right"
        asked = question(request.explain, request.top_k, side)
        if asked is None:
            return reply
        found = await self._explainer.explain(texts, asked)
        pairs = zip(reply.data, found, strict=True)
        return replace(reply, data=[replace(item, explanation=why) for item, why in pairs])

    def drift(self) -> DriftSnapshot | None:
        """What the texts looked like so far; None where nothing is counted."""
        return None if self._monitor is None else self._monitor.snapshot()

    async def stop(self) -> None:
        """Fail the explanations that are open; safe to call twice."""
        await self._explainer.stop()
