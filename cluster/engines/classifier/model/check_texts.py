"""Texts on which a low-precision model is compared with its float32 original.

A model directory may bring texts in ``held_out.jsonl``, one ``{"text": …}`` per line. The default
is 400 generated texts of 3 to about 120 words, the same every time: opinions for and against
products, films, people and news, on which most English classifiers give different answers.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import DataError

FILE = "held_out.jsonl"
NUM_TEXTS = 400
SEED = 0

_THINGS = (  # noqa: SIM905
    "the film, this phone, the new album, our hotel room, the service, my old laptop, "
    "the final chapter, the government's plan, this recipe, the battery, the second half, "
    "their support team, the delivery, the acting, the museum, her speech, the price, "
    "the train from the airport, the city council"
).split(", ")
_VERBS = (  # noqa: SIM905
    "was, felt, seemed, turned out, looks, has always been, is said to be, remained"
).split(", ")
_VIEWS = (  # noqa: SIM905
    "wonderful; a complete disaster; surprisingly good; dull and far too long; "
    "better than expected; not worth the money; broken again; quiet and clean; "
    "hard to recommend; simply the best of its kind; neither good nor bad; "
    "late, cold and expensive; a pleasure from beginning to end; fine, I suppose; "
    "an insult to the audience; delayed until next Tuesday; never as bad as people say; "
    "about average"
).split("; ")
_TAILS = [
    "",
    ", and I would do it again",
    ", but nobody listened",
    ", according to two reports",
    "!",
    ", which is a shame",
    ", so I sent it back",
    ", at least for children",
    "; we stayed until the end",
    ", thank you so much",
]


def check_texts(model_path: str) -> list[str]:
    """Return the model's own texts, or generated ones.

    Raises:
        DataError: a line of the model's file has no text.
    """
    file = Path(model_path) / FILE
    if not file.is_file():
        return list(_generate())
    lines = enumerate(file.read_bytes().splitlines(), start=1)
    return [_read_text(file, number, line) for number, line in lines if line.strip()]


def _read_text(file: Path, number: int, line: bytes) -> str:
    try:
        match json.loads(line):
            case {"text": str(text)}:
                return text
    except ValueError:  # neither UTF-8 nor JSON
        pass
    raise DataError(f'{file}:{number}: expected {{"text": "…"}}')


def _generate() -> Iterator[str]:
    rng = random.Random(SEED)
    for _ in range(NUM_TEXTS):
        yield " ".join(_sentence(rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5, 8))))


def _sentence(rng: random.Random) -> str:
    words = (rng.choice(_THINGS), rng.choice(_VERBS), rng.choice(_VIEWS))
    text = " ".join(words) + rng.choice(_TAILS)
    return text[0].upper() + text[1:] + ("" if text.endswith("!") else ".")
