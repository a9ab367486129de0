"""How to fine-tune; apart from what does it, since it needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """How to fine-tune; the defaults suit MiniLM-L6 and some ten thousand short texts."""

    label_names: tuple[str, ...]
    """In the order of their ids."""
    base_name: str = ""
    """What the model card calls the base; empty: the name of its directory."""
    epochs: int = 1
    patience: int = 0
    """Epochs without a lower validation loss before it stops; 0: it never does."""
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
    """Share of the texts that measures the result and is not trained on. With a patience, as much
    again says when to stop."""
    seed: int = 0
    threads: int | None = None
    """Compute threads; None: PyTorch's choice."""
