"""The texts that are classified: people's, rated, about 27 tokens long, in a fixed order."""

import random
from collections.abc import Sequence

from cluster.models.packages import source_archive
from cluster.models.sentiment import ARCHIVE, rated_texts

CHARS = range(40, 241)
"""Of a text, so that its tokens are 27 on average."""
SEED = 0


def load(count: int) -> list[str]:
    """``count`` different texts, in arrival order: lengths are mixed."""
    found = sorted({text for text, _ in rated_texts(source_archive(ARCHIVE)) if len(text) in CHARS})
    random.Random(SEED).shuffle(found)
    return found[:count]


def chunks(texts: Sequence[str], size: int) -> list[list[str]]:
    """Requests of ``size`` texts; what does not fill one is left out."""
    return [list(texts[i : i + size]) for i in range(0, len(texts) - size + 1, size)]
