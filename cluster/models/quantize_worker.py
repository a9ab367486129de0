"""Process that quantizes one model with AutoRound; the job is JSON on standard input."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.schemes import QuantizationScheme
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

_DYNAMIC_8_BIT = {
    "bits": 8,
    "group_size": -1,
    "sym": True,
    "act_bits": 8,
    "act_group_size": -1,
    "act_sym": True,
    "act_dynamic": True,
}
SCHEMES: dict[str, dict[str, Any]] = {
    "fp8": {**_DYNAMIC_8_BIT, "data_type": "fp", "act_data_type": "fp"},
    "w4a16": {"bits": 4, "sym": True, "data_type": "int", "act_bits": 16},
    "w8a8": {**_DYNAMIC_8_BIT, "data_type": "int", "act_data_type": "int"},
}
"""AutoRound's parameters of each scheme."""


def sequences(tokenizer: Any, texts: Sequence[str], num_tokens: int) -> list[Tensor]:
    """Return the texts one after the other, cut into sequences of equal length, [1, tokens]."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], *end]]
    num_tokens = min(num_tokens, len(ids))
    starts = range(0, len(ids) - num_tokens + 1, num_tokens)
    return [torch.tensor([ids[start : start + num_tokens]]) for start in starts]


def run(job: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    network = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    scheme = dict(SCHEMES[job["scheme"]])
    if job["group_size"]:
        scheme["group_size"] = job["group_size"]
    data = sequences(tokenizer, job["texts"], job["sequence_tokens"])
    quantizer = AutoRound(
        network,
        tokenizer=tokenizer,
        scheme=QuantizationScheme.from_dict(scheme),
        iters=job["iterations"] if job["scheme"] == "w4a16" else 0,
        dataset=data,
        nsamples=len(data),
        seqlen=data[0].shape[1],
        batch_size=min(4, len(data)),
        seed=job["seed"],
        device_map="auto" if torch.cuda.is_available() else "cpu",
    )
    quantizer.quantize_and_save(job["out"], format="llm_compressor")


if __name__ == "__main__":
    run(json.load(sys.stdin))
