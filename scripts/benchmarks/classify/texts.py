"""Texts of ``bench classify``: rated reviews of about 27 tokens, in a fixed order."""

import random
from collections.abc import Sequence

from cluster.models.packages import source_archive
from cluster.models.sentiment import ARCHIVE, rated_texts

CHARS = range(40, 241)
"""Allowed lengths in characters; the mean length is then 27 tokens."""
SEED = 0


def load_labelled(count: int) -> list[tuple[str, bool]]:
    """Return ``count`` different texts of mixed lengths; the flag is True if positive."""
    rated = dict(rated_texts(source_archive(ARCHIVE)))
    found = sorted((text, rating > 0) for text, rating in rated.items() if len(text) in CHARS)
    random.Random(SEED).shuffle(found)
    return found[:count]


def load(count: int) -> list[str]:
    """Return ``count`` texts without labels."""
    return [text for text, _ in load_labelled(count)]


def chunks(texts: Sequence[str], size: int) -> list[list[str]]:
    """Split into lists of ``size`` texts; drop an incomplete last one."""
    return [list(texts[i : i + size]) for i in range(0, len(texts) - size + 1, size)]
