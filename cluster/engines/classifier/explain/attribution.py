"""Explanations by integrated gradients and, cheaper, by attention rollout.

Works on a plain float32 copy of the network. The caller's ``check`` runs before every forward pass
and may raise to end the work.
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
from cluster.engines.classifier.model.outputs import apply_calibration, to_scores
from cluster.engines.classifier.model.types import Side, Text
from cluster.errors import InvalidRequestError

MAX_BATCH_TOKENS = 1024
"""Tokens of a path's points in one forward pass."""


@dataclass(frozen=True, slots=True)
class _TokenizedText:
    ids: Tensor
    """[1, tokens]"""
    types: dict[str, Tensor]
    """Token types [1, tokens]; empty if the network has none."""
    special: NDArray[np.bool_]
    """True for special tokens, [tokens]."""
    words: list[Word]
    word_of: NDArray[np.int64]
    """Index of each token's word; meaningless for special tokens."""

    def sum_by_word(self, values: Floats) -> Floats:
        """Sum [..., tokens] over the tokens of each word to [..., words]."""
        sums = np.zeros((*values.shape[:-1], len(self.words)))
        plain = ~self.special
        np.add.at(sums.T, self.word_of[plain], values[..., plain].T)
        return sums


class ExplainModel:
    """Classifier that explains its scores.

    Args:
        network: A float32 ``*ForSequenceClassification`` with eager attention.
        tokenizer: Its fast tokenizer; used by one thread at a time.
        max_tokens: Length of the longest text.
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
        """Explain a text or pair; a long one is cut.

        Raises:
            InvalidRequestError: The network does not return its attention, which rollout needs.
        """
        tokenized = self._tokenize(text, question.side)
        if question.method == "rollout":
            return self._rollout(tokenized, check)
        return self._integrated_gradients(tokenized, question.top_k, check)

    def _integrated_gradients(
        self, text: _TokenizedText, top_k: int | None, check: Callable[[], None]
    ) -> Explanation:
        """Compute each word's contribution to the scores of the ``top_k`` best labels.

        The path is the straight line between the word embeddings of the text with every word masked
        and those of the text.
        """
        best = self._best_labels(text, top_k, check)
        with torch.no_grad():
            end = self._embeddings(text.ids)
            plain = torch.from_numpy(~text.special).to(text.ids.device)
            start = self._embeddings(text.ids.masked_fill(plain, self._baseline_id))
        path = _Path(self, text, start, end - start, best)
        integral = integrate(lambda points: path.evaluate(points, check))
        contributions = text.sum_by_word(integral.parts).tolist()
        names = self._network.config.id2label
        rows = zip(best, integral.end, integral.start, integral.error, contributions, strict=True)
        labels = [
            LabelContributions(names[i], float(score), float(base), float(error), words)
            for i, score, base, error, words in rows
        ]
        return Explanation("integrated_gradients", text.words, labels)

    @torch.no_grad()
    def _rollout(self, text: _TokenizedText, check: Callable[[], None]) -> Explanation:
        """Compute how much of the first token's attention reaches each word through all layers.

        Each layer passes on half of its input and mixes the other half by the mean attention of its
        heads (Abnar and Zuidema, arXiv:2005.00928).
        """
        check()
        output = self._network(input_ids=text.ids, output_attentions=True, **text.types)
        if not output.attentions or output.attentions[0] is None:
            raise InvalidRequestError(
                "this model does not return its attention; use the method integrated_gradients",
                param="explain",
            )
        reach = torch.eye(text.ids.shape[1], device=text.ids.device)
        for attention in output.attentions:
            mixed = (attention[0].mean(0) + torch.eye(len(reach), device=reach.device)) / 2
            reach = mixed @ reach
        weights = text.sum_by_word(reach[0].cpu().double().numpy())
        total = max(float(weights.sum()), 1e-12)
        return Explanation("rollout", text.words, weights=(weights / total).tolist())

    def scores(self, embeddings: Tensor, text: _TokenizedText) -> Tensor:
        """Return scores [points, labels] of variants of ``text``, [points, tokens, hidden]."""
        count, length, _ = embeddings.shape
        types = {name: rows.expand(count, length) for name, rows in text.types.items()}
        mask = torch.ones(count, length, dtype=torch.long, device=embeddings.device)
        logits = self._network(inputs_embeds=embeddings, attention_mask=mask, **types).logits
        return to_scores(logits, self._network.config)

    @torch.no_grad()
    def _best_labels(
        self, text: _TokenizedText, top_k: int | None, check: Callable[[], None]
    ) -> list[int]:
        check()
        scores = self.scores(self._embeddings(text.ids), text)[0]
        order: list[int] = scores.argsort(descending=True, stable=True).tolist()
        return order[:top_k]

    def _tokenize(self, text: Text, side: Side) -> _TokenizedText:
        parts = (text,) if isinstance(text, str) else text
        self._tokenizer.truncation_side = side
        # In a list: outside of one, transformers treats an empty second text as no pair.
        encoding = self._tokenizer(
            [text], truncation="longest_first", max_length=self._max_tokens
        ).encodings[0]
        special = np.array(encoding.special_tokens_mask, bool)
        words, word_of = _split_words(parts, encoding, special)
        device = self._network.device
        types = {}
        if self._has_types:
            types["token_type_ids"] = torch.tensor([encoding.type_ids], device=device)
        ids = torch.tensor([encoding.ids], device=device)
        return _TokenizedText(ids, types, special, words, word_of)


def _split_words(
    parts: Sequence[str], encoding: Any, special: NDArray[np.bool_]
) -> tuple[list[Word], NDArray[np.int64]]:
    """Return the words of a text and its pair, and the index of each token's word."""
    words: list[Word] = []
    word_of = np.zeros(len(special), np.int64)
    last: tuple[int, int | None] | None = None
    for token in np.flatnonzero(~special).tolist():
        (start, end), word = encoding.offsets[token], encoding.word_ids[token]
        part = encoding.sequence_ids[token] or 0
        if word is not None and last == (part, word):
            start = words.pop().start
        # Some tokenizers include the blank before a word.
        bare = parts[part][start:end].lstrip()
        start = end - len(bare) if bare else start
        words.append(Word(parts[part][start:end], start, end, part == 1))
        last, word_of[token] = (part, word), len(words) - 1
    return words, word_of


@dataclass(frozen=True, slots=True)
class _Path:
    """Line from a masked text to the text, and some labels' scores along it."""

    model: ExplainModel
    text: _TokenizedText
    start: Tensor
    """Embeddings of the masked text, [1, tokens, hidden]."""
    step: Tensor
    """Difference to the embeddings of the text, [1, tokens, hidden]."""
    labels: list[int]

    def evaluate(self, points: Sequence[float], check: Callable[[], None]) -> tuple[Floats, Floats]:
        size = max(1, MAX_BATCH_TOKENS // self.step.shape[1])
        parts = []
        for first in range(0, len(points), size):
            check()
            parts.append(self._evaluate_batch(points[first : first + size]))
        scores, slopes = zip(*parts, strict=True)
        return np.concatenate(scores), np.concatenate(slopes)

    def _evaluate_batch(self, points: Sequence[float]) -> tuple[Floats, Floats]:
        x = torch.tensor(points, dtype=self.step.dtype, device=self.step.device)
        embeddings = (self.start + x[:, None, None] * self.step).requires_grad_()
        scores = self.model.scores(embeddings, self.text)[:, self.labels]
        slopes = [self._slopes(scores[:, i], embeddings) for i in range(len(self.labels))]
        return scores.detach().cpu().double().numpy(), np.stack(slopes, axis=1)

    def _slopes(self, scores: Tensor, embeddings: Tensor) -> Floats:
        """Return [points, tokens]."""
        # Each score depends on its own point only, so the sum's gradient has the gradients of all.
        (gradient,) = torch.autograd.grad(scores.sum(), embeddings, retain_graph=True)
        return np.asarray((gradient * self.step).sum(-1).cpu().double().numpy())
