"""Parts of a text that share the words of a sentence or question.

Relevance is the share of the sentence's words that a part has, each weighted by its rarity among
the parts (inverse document frequency). It needs no model, and is the same for every model.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence

from cluster.applications.chunks import Part, sentences
from cluster.tasks import Reference

MIN_SCORE = 0.3
"""Relevance from which a part counts as a source."""
MAX_REFERENCES = 3
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+")
_MIN_CHARS = 3  # of a word that means something; numbers and acronyms may be shorter
# fmt: off
_COMMON = frozenset({
    "about", "all", "and", "are", "but", "can", "does", "for", "from", "had", "has", "have", "how",
    "into", "its", "not", "our", "out", "that", "the", "them", "then", "there", "these", "they",
    "this", "those", "was", "were", "what", "when", "where", "which", "who", "whose", "why",
    "will", "with", "would", "you", "your",
})
# fmt: on


class Evidence:
    """Index of a text's parts by their words."""

    def __init__(self, text: str, parts: Sequence[Part]) -> None:
        self.parts = parts
        self._parts_by_word: dict[str, list[int]] = defaultdict(list)
        for index, part in enumerate(parts):
            for word in words(part.of(text)):
                self._parts_by_word[word].append(index)

    @classmethod
    def of_sentences(cls, text: str) -> "Evidence":
        return cls(text, list(sentences(text)))

    def rank(
        self, sentence: str, max_parts: int, min_score: float = 0.0
    ) -> list[tuple[int, float]]:
        """Return index and relevance of the most relevant parts, best first."""
        scores: dict[int, float] = defaultdict(float)
        total = 0.0
        for word in words(sentence):
            found = self._parts_by_word.get(word, ())
            weight = math.log(1 + len(self.parts) / (len(found) or 0.5))
            total += weight
            for index in found:
                scores[index] += weight
        shares = ((index, score / total) for index, score in scores.items())
        best = sorted(shares, key=lambda pair: (-pair[1], pair[0]))[:max_parts]
        return [(index, round(share, 4)) for index, share in best if share >= min_score]

    def references(self, sentence: str) -> list[Reference]:
        """Return the parts from which a sentence may come, best first."""
        return [
            Reference(start=self.parts[index].start, end=self.parts[index].end, score=score)
            for index, score in self.rank(sentence, MAX_REFERENCES, MIN_SCORE)
        ]


def words(text: str) -> set[str]:
    """Return the words of a text that carry meaning; all of them if none seems to."""
    found = {word.casefold(): word for word in _WORD.findall(text)}
    kept = {
        folded
        for folded, word in found.items()
        if folded not in _COMMON
        and (len(word) >= _MIN_CHARS or not word.isascii() or word.isupper() or word.isdigit())
    }
    return kept or set(found)
