"""Formats of other servers' APIs, translated to the requests of the tasks and back."""

from cluster.engines.classifier.serving.apis import huggingface, infinity, tei
from cluster.engines.classifier.serving.endpoints import Translation

TRANSLATIONS: tuple[Translation, ...] = (
    *tei.TRANSLATIONS,
    *infinity.TRANSLATIONS,
    *huggingface.TRANSLATIONS,
)
