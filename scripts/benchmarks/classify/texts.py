"""The texts that are classified: people's, rated, about 27 tokens long, in a fixed order."""

import random
from collections.abc import Sequence

from cluster.models.packages import source_archive
from cluster.models.sentiment import ARCHIVE, rated_texts

CHARS = range(40, 241)
"""Of a text, so that its tokens are 27 on average."""
SEED = 0


def labelled(count: int) -> list[tuple[str, bool]]:
    """``count`` different texts in arrival order (lengths are mixed), and whether they praise."""
    rated = dict(rated_texts(source_archive(ARCHIVE)))
    found = sorted((text, rating > 0) for text, rating in rated.items() if len(text) in CHARS)
    random.Random(SEED).shuffle(found)
    return found[:count]


def load(count: int) -> list[str]:
    """The texts alone."""
    return [text for text, _ in labelled(count)]


def chunks(texts: Sequence[str], size: int) -> list[list[str]]:
    """Requests of ``size`` texts; what does not fill one is left out."""
    return [list(texts[i : i + size]) for i in range(0, len(texts) - size + 1, size)]
