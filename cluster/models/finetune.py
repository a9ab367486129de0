"""Fine-tuning of a BERT encoder into a classifier of texts, whose embeddings stay useful.

A plain PyTorch loop. transformers' Trainer would serve, but it knows no way to run the frozen
layers once for both the classifier and the reference embedding, and that is what makes a run on
two cores short. Knows nothing of particular data or of the model store. Loads torch.
"""

import copy
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, BertForSequenceClassification

from cluster.errors import ConfigError
from cluster.models.quiet import quiet_transformers
from cluster.models.store import Progress

WARMUP = 0.06  # share of the steps, as in RoBERTa's fine-tuning (arXiv:1907.11692, table 10)
BUCKET = 50  # batches that are sorted by length together: little padding, still shuffled
EVAL_BATCH = 64  # texts


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """How to fine-tune; the defaults suit MiniLM-L6 and some ten thousand short texts."""

    label_names: tuple[str, ...]
    """In the order of their ids."""
    epochs: int = 1
    batch_size: int = 32
    max_tokens: int = 48
    """Of a text while training; what is longer is cut."""
    learning_rate: float = 3e-4
    head_learning_rate: float = 1e-3
    frozen_layers: int = 4
    """Lowest layers of the encoder that stay as they are; the word embeddings always do."""
    keep_embeddings: float = 2.0
    """Weight of the cosine distance to the base's mean-pooled embeddings; 0: they may drift."""
    held_out: float = 0.1
    """Share of the texts that measures the accuracy and is not trained on."""
    seed: int = 0
    threads: int | None = None
    """Compute threads; None: PyTorch's choice."""


@dataclass(frozen=True, slots=True)
class FinetuneMetrics:
    """What came out, measured on the held-out texts."""

    accuracy: float
    embedding_similarity: float
    """Mean cosine of the new and the base's mean-pooled embedding of the same text."""
    num_train: int
    num_held_out: int
    train_s: float


@dataclass(frozen=True, slots=True)
class _Example:
    ids: list[int]
    label: int


def finetune(
    texts: Sequence[str],
    labels: Sequence[str],
    base: Path,
    out: Path,
    options: FinetuneOptions,
    progress: Progress,
) -> FinetuneMetrics:
    """Train a classifier of ``texts`` on top of the BERT in ``base`` and save it to ``out``.

    Each text counts once, with its first label, so none stands on both sides of the split. The
    same input gives the same model on the same machine.

    Args:
        texts: The texts, in any order.
        labels: For each text one of ``options.label_names``.
        base: A model directory of a BERT with its tokenizer.
        out: A directory that exists.
        options: How to train.
        progress: Called often, with the share of the training that is done.

    Raises:
        ConfigError: the labels do not fit the texts, or there are too few of either.
    """
    train_rows, held_out_rows = split(texts, labels, options)
    with quiet_transformers(), _threads(options.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        progress("reading the encoder", None)
        tokenizer = AutoTokenizer.from_pretrained(base)
        trainer = _Trainer(_load(base, options), options)
        started = time.monotonic()
        train = _encode(tokenizer, train_rows, options)
        trainer.train(train, progress)
        train_s = time.monotonic() - started
        progress("measuring the accuracy", None)
        held_out = _encode(tokenizer, held_out_rows, options)
        accuracy, similarity = trainer.evaluate(held_out)
        trainer.model.save_pretrained(out)
        _save_tokenizer(tokenizer, out)
    return FinetuneMetrics(
        accuracy=round(accuracy, 4),
        embedding_similarity=round(similarity, 4),
        num_train=len(train),
        num_held_out=len(held_out),
        train_s=round(train_s, 1),
    )


def split(
    texts: Sequence[str], labels: Sequence[str], options: FinetuneOptions
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """The texts with their label ids, to train on and held out; shuffled, without duplicates.

    Raises:
        ConfigError: see ``finetune``.
    """
    if len(texts) != len(labels):
        raise ConfigError(f"labels: got {len(labels)} for {len(texts)} texts; one each is needed")
    ids = {name: i for i, name in enumerate(options.label_names)}
    if unknown := sorted(set(labels) - ids.keys()):
        raise ConfigError(f"labels: got {unknown[0]!r}; allowed: {', '.join(ids)}")
    unique: dict[str, tuple[str, int]] = {}
    for text, label in zip(texts, labels, strict=True):
        unique.setdefault(" ".join(text.casefold().split()), (text, ids[label]))
    rows = list(unique.values())
    random.Random(options.seed).shuffle(rows)
    num_held_out = round(len(rows) * options.held_out)
    train, held_out = rows[num_held_out:], rows[:num_held_out]
    if not held_out or len({label for _, label in train}) < 2:
        raise ConfigError(f"texts: got {len(rows)} different ones; too few to train and to measure")
    return train, held_out


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load(base: Path, options: FinetuneOptions) -> Any:
    model = BertForSequenceClassification.from_pretrained(
        base,
        dtype=torch.float32,
        id2label=dict(enumerate(options.label_names)),
        label2id={name: i for i, name in enumerate(options.label_names)},
        attn_implementation="sdpa",
    )
    model.config.problem_type = "single_label_classification"
    return model


def _save_tokenizer(tokenizer: Any, out: Path) -> None:
    # It would keep the cut that training made, and whoever reads tokenizer.json would make it too.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(out)


def _encode(
    tokenizer: Any, rows: Sequence[tuple[str, int]], options: FinetuneOptions
) -> list[_Example]:
    texts = [text for text, _ in rows]
    ids = tokenizer(texts, truncation=True, max_length=options.max_tokens)["input_ids"]
    return [_Example(i, label) for i, (_, label) in zip(ids, rows, strict=True)]


def _batches(
    examples: Sequence[_Example], batch_size: int, rng: random.Random
) -> list[list[_Example]]:
    """Shuffled batches of texts of like lengths."""
    shuffled = rng.sample(examples, len(examples))
    batches = []
    for start in range(0, len(shuffled), batch_size * BUCKET):
        bucket = sorted(shuffled[start : start + batch_size * BUCKET], key=lambda e: len(e.ids))
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    rng.shuffle(batches)
    return batches


def _collate(batch: Sequence[_Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and mask, [texts, longest], padded with zeros; labels, [texts]."""
    rows = [torch.tensor(example.ids) for example in batch]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(example.ids) for example in batch])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return ids, mask, torch.tensor([example.label for example in batch])


class _Trainer:
    """A model, the reference that it must not drift from, and the steps between."""

    def __init__(self, model: Any, options: FinetuneOptions) -> None:
        self.model = model
        self.options = options
        layers = model.bert.encoder.layer
        cut = min(options.frozen_layers, len(layers))
        self.frozen, self.tuned = layers[:cut], layers[cut:]
        self.reference = copy.deepcopy(self.tuned).eval()
        for module in (model.bert.embeddings, self.frozen, self.reference):
            module.requires_grad_(False)
        head = [*model.bert.pooler.parameters(), *model.classifier.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.tuned.parameters()), "lr": options.learning_rate},
                {"params": head, "lr": options.head_learning_rate},
            ],
            weight_decay=0.01,
            fused=True,
        )
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]

    def train(self, examples: Sequence[_Example], progress: Progress) -> None:
        rng = random.Random(self.options.seed)
        epochs = range(self.options.epochs)
        steps = [b for _ in epochs for b in _batches(examples, self.options.batch_size, rng)]
        warmup = max(1, round(WARMUP * len(steps)))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda i: min((i + 1) / warmup, (len(steps) - i) / len(steps))
        )
        self.model.train()
        self.model.bert.embeddings.eval()  # no dropout below: the reference sees the same
        self.frozen.eval()
        for done, batch in enumerate(steps):
            progress("training", done / len(steps))
            self._step(batch)
            schedule.step()
        self.model.eval()

    def _step(self, batch: Sequence[_Example]) -> None:
        logits, similarity, labels = self._forward(batch)
        drift = 1 - similarity.mean()
        loss = functional.cross_entropy(logits, labels) + self.options.keep_embeddings * drift
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _forward(self, batch: Sequence[_Example]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, [texts, labels]; cosine to the reference embedding, [texts]; labels, [texts]."""
        ids, mask, labels = _collate(batch)
        attend = mask[:, None, None, :]
        with torch.no_grad():
            below = _run(self.frozen, self.model.bert.embeddings(input_ids=ids), attend)
            reference = _mean(_run(self.reference, below, attend), mask)
        hidden = _run(self.tuned, below, attend)
        logits = self.model.classifier(self.model.dropout(self.model.bert.pooler(hidden)))
        return logits, functional.cosine_similarity(_mean(hidden, mask), reference), labels

    @torch.no_grad()
    def evaluate(self, examples: Sequence[_Example]) -> tuple[float, float]:
        """Accuracy, and mean cosine of the embeddings to the reference."""
        ordered = sorted(examples, key=lambda example: len(example.ids))
        right = similarity = 0.0
        for start in range(0, len(ordered), EVAL_BATCH):
            logits, cosine, labels = self._forward(ordered[start : start + EVAL_BATCH])
            right += float((logits.argmax(-1) == labels).sum())
            similarity += float(cosine.sum())
        return right / len(ordered), similarity / len(ordered)


def _run(layers: nn.ModuleList, hidden: Tensor, attend: Tensor) -> Tensor:
    for layer in layers:
        output = layer(hidden, attend)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the hidden states of the tokens that are not padding, [texts, width]."""
    weights = mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)
