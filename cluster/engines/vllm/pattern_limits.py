"""Limits on the patterns of JSON schemas, which vLLM translates on the event loop.

xgrammar's time grows with the square of a repetition: `.{1,500}` takes 0.2 s, `.{1,2000}` 3 s (AMD
EPYC, Zen 4). The replica's other requests wait meanwhile. vLLM's own time limit covers only
`structured_outputs.regex`.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from cluster.engines.vllm import internals

MAX_REPEATS = 500
"""Largest repetition. Of several in one schema, the squares are added."""
MAX_SIZE = 10_000
"""Characters of all patterns, repetitions written out; they take 0.4 s."""

_TOKENS = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\((?:\?[:=!])?|\)|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL
)


def check_patterns(structured_outputs: Any) -> None:
    """Raise vLLM's 400 if the patterns of a request's schema are too large."""
    squares = size = 0
    for spec in (structured_outputs.json, structured_outputs.structural_tag):
        for pattern in _patterns(spec):
            added_squares, added_size = _measure(pattern)
            squares += added_squares
            size += added_size
    if squares > MAX_REPEATS**2 or size > MAX_SIZE:
        raise internals.VLLMValidationError(
            f"The patterns of the JSON schema repeat too much; {{1,{MAX_REPEATS}}} is the limit. "
            "Use `maxLength` or `maxItems` instead.",
            parameter="structured_outputs",
        )


def _patterns(spec: Any) -> Iterator[str]:
    if isinstance(spec, str):
        try:
            spec = json.loads(spec)
        except (ValueError, RecursionError):  # vLLM rejects it
            return
    remaining = [spec]
    while remaining:
        node = remaining.pop()
        if isinstance(node, list):
            remaining += node
        elif isinstance(node, dict):
            if isinstance(pattern := node.get("pattern"), str):
                yield pattern
            if isinstance(by_pattern := node.get("patternProperties"), dict):
                yield from by_pattern
            remaining += node.values()


def _measure(pattern: str) -> tuple[int, int]:
    """Return the sum of the squared repetitions, and the size with all repetitions written out."""
    squares = last = 0
    sizes = [0]  # of the open groups, outermost first
    for token in _TOKENS.finditer(pattern):
        text = token[0]
        if token[1] is not None:
            repeats = max(int(token[1][:9]), int((token[2] or "0")[:9]))
            squares += repeats**2
            sizes[-1] += last * (repeats - 1)
            last *= repeats
        elif text.startswith("("):
            sizes.append(0)
        elif text == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        else:
            last = 1
            sizes[-1] += 1
    return squares, sum(sizes)
