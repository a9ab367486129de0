"""Labels in the answers of classifiers, in all their formats, and their comparison."""

import json
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any


def compare_labels(old: bytes, new: bytes) -> tuple[int, int]:
    """Return the number of labels in two JSON answers to a request, and how many are equal."""
    try:
        answers = [list(_labels(json.loads(content))) for content in (old, new)]
    except ValueError:
        return 0, 0
    pairs = list(zip_longest(*answers))
    return len(pairs), sum(first == second for first, second in pairs)


def _labels(answer: Any) -> Iterator[tuple[Any, ...]]:
    if isinstance(answer, dict):
        if isinstance(answer.get("label"), str):  # of a text, or of an entity in it
            yield answer["label"], answer.get("start"), answer.get("end")
        else:
            for value in answer.values():
                yield from _labels(value)
    elif isinstance(answer, list):
        if len(answer) > 1 and all(map(_is_score, answer)):  # of all labels of one text
            yield from _labels(max(answer, key=lambda entry: entry["score"]))
        else:
            for value in answer:
                yield from _labels(value)


def _is_score(entry: Any) -> bool:
    """Return True for the score of a label of a whole text."""
    return isinstance(entry, dict) and entry.keys() == {"label", "score"}
