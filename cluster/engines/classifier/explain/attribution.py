"""Why a text has its labels: integrated gradients, and attention rollout as the cheap way.

Works on a plain float32 copy of the network, by transformers alone. Runs in whatever thread calls
it and owns no thread; ``check`` is called before every forward and may raise to end the work.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from cluster.engines.classifier.explain.integral import Floats, integrate
from cluster.engines.classifier.explain.schema import (
    Explanation,
    LabelContributions,
    Question,
    Word,
)
from cluster.engines.classifier.model.load import has_token_types
from cluster.engines.classifier.model.scores import apply_calibration, to_scores
from cluster.engines.classifier.model.template import Side
from cluster.engines.classifier.model.types import Text
from cluster.errors import InvalidRequestError

MAX_TOKENS_AT_ONCE = 1024
"""Of all points of a path that go through the network together."""


@dataclass(frozen=True, slots=True)
class _Read:
    """A text as the network reads it."""

    ids: Tensor
    """[1, tokens]"""
    types: dict[str, Tensor]
    """Token types [1, tokens], where the network has them."""
    special: NDArray[np.bool_]
    """Which tokens stand for no part of the text, [tokens]."""
    words: list[Word]
    word_of: NDArray[np.int64]
    """Each token's word; those of special tokens mean nothing."""

    def by_word(self, tokens: Floats) -> Floats:
        """Sums over each word's tokens: [..., tokens] → [..., words]."""
        sums = np.zeros((*tokens.shape[:-1], len(self.words)))
        plain = ~self.special
        np.add.at(sums.T, self.word_of[plain], tokens[..., plain].T)
        return sums


class ExplainModel:
    """A classifier that can say why.

    Args:
        network: A ``*ForSequenceClassification`` in float32 whose attention is computed eagerly.
        tokenizer: Its fast tokenizer; used by one thread at a time.
        max_tokens: The longest text.
    """

    def __init__(self, network: Any, tokenizer: Any, max_tokens: int) -> None:
        self._network = network.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._has_types = has_token_types(network, tokenizer)
        self._embeddings = network.get_input_embeddings()
        ids = (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, 0)
        self._baseline_id = next(i for i in ids if i is not None)

    @classmethod
    def load(cls, path: str, device: torch.device, max_tokens: int) -> "ExplainModel":
        """Load a copy of the model directory ``path``; takes seconds and blocks."""
        transformers_logging.disable_progress_bar()
        network = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, attn_implementation="eager"
        )
        apply_calibration(network.config, Path(path))
        return cls(network.to(device), AutoTokenizer.from_pretrained(path), max_tokens)

    def explain(self, text: Text, question: Question, check: Callable[[], None]) -> Explanation:
        """Answer a question about a text, or a text and its pair; what is too long is cut.

        Raises:
            InvalidRequestError: the network gives no attention to roll out.
        """
        read = self._read(text, question.side)
        if question.method == "rollout":
            return self._rollout(read, check)
        return self._integrated_gradients(read, question.top_k, check)

    def _integrated_gradients(
        self, read: _Read, top_k: int | None, check: Callable[[], None]
    ) -> Explanation:
        """What each word adds to the scores of the ``top_k`` best labels (None: of all).

        The path goes from the text with every word masked to the text itself, straight through the
        space of the word embeddings.
        """
        best = self._best(read, top_k, check)
        with torch.no_grad():
            end = self._embeddings(read.ids)
            plain = torch.from_numpy(~read.special).to(read.ids.device)
            start = self._embeddings(read.ids.masked_fill(plain, self._baseline_id))
        path = _Path(self, read, start, end - start, best)
        integral = integrate(lambda points: path.evaluate(points, check))
        contributions = read.by_word(integral.parts).tolist()
        names = self._network.config.id2label
        rows = zip(best, integral.end, integral.start, integral.error, contributions, strict=True)
        labels = [
            LabelContributions(names[i], float(score), float(base), float(error), words)
            for i, score, base, error, words in rows
        ]
        return Explanation("integrated_gradients", read.words, labels)

    @torch.no_grad()
    def _rollout(self, read: _Read, check: Callable[[], None]) -> Explanation:
        """How far the first token's attention reaches each word, through all layers.

        Each layer passes on half of what it gets and mixes the other half by its heads' mean
        attention (Abnar and Zuidema, arXiv:2005.00928).
        """
        check()
        output = self._network(input_ids=read.ids, output_attentions=True, **read.types)
        if not output.attentions or output.attentions[0] is None:
            raise InvalidRequestError("this model gives no attention to roll out", param="explain")
        reach = torch.eye(read.ids.shape[1], device=read.ids.device)
        for attention in output.attentions:
            mixed = (attention[0].mean(0) + torch.eye(len(reach), device=reach.device)) / 2
            reach = mixed @ reach
        weights = read.by_word(reach[0].cpu().double().numpy())
        total = max(float(weights.sum()), 1e-12)
        return Explanation("rollout", read.words, weights=(weights / total).tolist())

    def scores(self, embeddings: Tensor, read: _Read) -> Tensor:
        """Of embedded texts, [texts, tokens, hidden], all as long as ``read``: [texts, labels]."""
        count, length, _ = embeddings.shape
        types = {name: rows.expand(count, length) for name, rows in read.types.items()}
        mask = torch.ones(count, length, dtype=torch.long, device=embeddings.device)
        logits = self._network(inputs_embeds=embeddings, attention_mask=mask, **types).logits
        return to_scores(logits, self._network.config)

    @torch.no_grad()
    def _best(self, read: _Read, top_k: int | None, check: Callable[[], None]) -> list[int]:
        check()
        scores = self.scores(self._embeddings(read.ids), read)[0]
        order: list[int] = scores.argsort(descending=True, stable=True).tolist()
        return order[:top_k]

    def _read(self, text: Text, side: Side) -> _Read:
        parts = (text,) if isinstance(text, str) else text
        self._tokenizer.truncation_side = side
        # In a list, because transformers takes an empty pair for none where it stands alone.
        encoding = self._tokenizer(
            [text], truncation="longest_first", max_length=self._max_tokens
        ).encodings[0]
        special = np.array(encoding.special_tokens_mask, bool)
        words, word_of = _words(parts, encoding, special)
        device = self._network.device
        types = {}
        if self._has_types:
            types["token_type_ids"] = torch.tensor([encoding.type_ids], device=device)
        ids = torch.tensor([encoding.ids], device=device)
        return _Read(ids, types, special, words, word_of)


def _words(
    parts: Sequence[str], encoding: Any, special: NDArray[np.bool_]
) -> tuple[list[Word], NDArray[np.int64]]:
    """The words of a text and its pair, and the place of each token's word among them."""
    words: list[Word] = []
    word_of = np.zeros(len(special), np.int64)
    last: tuple[int, int | None] | None = None
    for token in np.flatnonzero(~special).tolist():
        (start, end), word = encoding.offsets[token], encoding.word_ids[token]
        part = encoding.sequence_ids[token] or 0
        if word is not None and last == (part, word):
            start = words.pop().start
        # Some tokenizers count the blank before a word to it.
        bare = parts[part][start:end].lstrip()
        start = end - len(bare) if bare else start
        words.append(Word(parts[part][start:end], start, end, part == 1))
        last, word_of[token] = (part, word), len(words) - 1
    return words, word_of


@dataclass(frozen=True, slots=True)
class _Path:
    """The straight way from a masked text to the text, and some labels' scores along it."""

    model: ExplainModel
    read: _Read
    start: Tensor
    step: Tensor
    """[1, tokens, hidden] both."""
    labels: list[int]

    def evaluate(self, points: Sequence[float], check: Callable[[], None]) -> tuple[Floats, Floats]:
        """See ``explain_integral.Evaluate``."""
        size = max(1, MAX_TOKENS_AT_ONCE // self.step.shape[1])
        parts = []
        for first in range(0, len(points), size):
            check()
            parts.append(self._evaluate(points[first : first + size]))
        scores, slopes = zip(*parts, strict=True)
        return np.concatenate(scores), np.concatenate(slopes)

    def _evaluate(self, points: Sequence[float]) -> tuple[Floats, Floats]:
        where = torch.tensor(points, dtype=self.step.dtype, device=self.step.device)
        embeddings = (self.start + where[:, None, None] * self.step).requires_grad_()
        all_scores = self.model.scores(embeddings, self.read)
        scores = all_scores[:, self.labels]
        slopes = [self._slopes(scores[:, i], embeddings) for i in range(len(self.labels))]
        return scores.detach().cpu().double().numpy(), np.stack(slopes, axis=1)

    def _slopes(self, scores: Tensor, embeddings: Tensor) -> Floats:
        """[points, tokens]; each point's score hangs on its own row alone, so one sum will do."""
        (gradient,) = torch.autograd.grad(scores.sum(), embeddings, retain_graph=True)
        return np.asarray((gradient * self.step).sum(-1).cpu().double().numpy())
