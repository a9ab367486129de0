"""Tiny random encoder with whole words as tokens, for tests that train or load one."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save(path: Path, words: list[str], pieces: tuple[str, ...] = (), network=None) -> Path:
    """Save a BERT and a WordPiece tokenizer with ``words`` and ``##pieces``."""
    vocab = [*SPECIAL, *words, *(f"##{piece}" for piece in pieces)]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocab)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    tokens = {f"{name}_token": word for name, word in zip(names, SPECIAL, strict=True)}
    PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=32, **tokens
    ).save_pretrained(path)
    if network is None:
        network = BertModel(tiny_config(len(vocab)))
    network.eval().save_pretrained(path)
    return path


def tiny_config(vocab_size: int, **changes) -> BertConfig:
    torch.manual_seed(0)
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
        initializer_range=0.2,
        pad_token_id=0,
        **changes,
    )
