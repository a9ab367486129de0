"""Prompts of random words with a known number of tokens."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

TOKENS = 128
SPACE = "Ġ"
"""How a byte-level vocabulary writes the space that a word begins with."""
LETTERS = 4
"""The shortest word."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Words that the model's tokenizer takes for one token each."""

    words: tuple[str, ...]

    @classmethod
    def of(cls, model: Path) -> "Prompts":
        """The words of the model in this directory."""
        tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
        return cls.in_vocabulary(tokenizer["model"]["vocab"])

    @classmethod
    def in_vocabulary(cls, vocabulary: dict[str, int]) -> "Prompts":
        """Its entries that are a space and a plain word."""
        words = (entry[1:] for entry in vocabulary if entry.startswith(SPACE))
        plain = (word for word in words if word.isascii() and word.isalpha() and word.islower())
        return cls(tuple(sorted(word for word in plain if len(word) >= LETTERS)))

    def some(self, num: int, *seed: int | str) -> list[str]:
        """So many different prompts; the same again for the same seed."""
        chance = random.Random(repr(seed))
        return ["".join(f" {w}" for w in chance.choices(self.words, k=TOKENS)) for _ in range(num)]
