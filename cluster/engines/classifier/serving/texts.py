"""The inputs that bodies may hold: a text, a text and its pair, or a list of these."""

from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta, Struct

from cluster.engines.classifier.model.types import Text


class Pair(Struct, frozen=True, forbid_unknown_fields=True):
    """A text, with its pair or without, by names."""

    text: str
    text_pair: str | None = None


PairList = Annotated[list[str], Meta(min_length=2, max_length=2)]
"""A text and its pair as a list."""
Item = str | Pair | PairList
ItemOrList = str | Pair | list[Item]


def to_texts(given: ItemOrList) -> list[Text]:
    """The texts of an ``input``."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, Pair):
        return [_text(given)]
    return [item if isinstance(item, str) else _text(item) for item in given]


def _text(item: Pair | Sequence[str]) -> Text:
    if isinstance(item, Pair):
        return item.text if item.text_pair is None else (item.text, item.text_pair)
    first, second = item
    return first, second
