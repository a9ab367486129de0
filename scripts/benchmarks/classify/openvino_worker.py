"""The latency of one text in OpenVINO, the peer of ``single_ratio_vs_openvino_bf16``.

Runs as ``python -m benchmarks.classify.openvino_worker MODEL_DIR`` in OpenVINO's environment, with
the protocol of ``inprocess``. The model is converted from PyTorch with dynamic shapes, and computes
in bfloat16 with OpenVINO's settings for latency on all cores.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.classify import texts
from benchmarks.classify.inprocess import CORES, NUM_SINGLES, Run, single_ms
from benchmarks.targets.peer_environment import install_peer, use_our_packages
from cluster.engines.classifier.model.tokenizer import TextTokenizer
from cluster.engines.classifier.model.types import TokenIds

VERSION = "2026.4.1"
SETTINGS = {
    "INFERENCE_PRECISION_HINT": "bf16",
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_NUM_THREADS": CORES,
}


def install_openvino() -> Path:
    """Return the Python of OpenVINO's environment; install it if it is missing."""
    environment = install_peer(f"openvino-{VERSION}", [f"openvino=={VERSION}"])
    use_our_packages(environment)  # PyTorch and transformers, for the conversion
    return environment / "bin" / "python"


class _Logits(torch.nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self._network = network

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self._network(input_ids=input_ids, attention_mask=attention_mask).logits


def _load(path: str) -> Run:
    openvino = importlib.import_module("openvino")  # only in its own environment
    network = AutoModelForSequenceClassification.from_pretrained(path).eval()
    example = (torch.ones(1, 9, dtype=torch.int64),) * 2
    shapes = [openvino.PartialShape([-1, -1])] * 2
    converted = openvino.convert_model(_Logits(network), example_input=example, input=shapes)
    request = openvino.Core().compile_model(converted, "CPU", SETTINGS).create_infer_request()

    def run(batch: Sequence[TokenIds]) -> Any:
        tokens = np.stack(batch)
        return request.infer([tokens, np.ones_like(tokens)])[0]

    return run


def _main(path: str) -> None:
    tokenizer = TextTokenizer(AutoTokenizer.from_pretrained(path), 512)
    rows = tokenizer.encode(texts.load(NUM_SINGLES), 0, "right")
    run = _load(path)
    for _ in sys.stdin:
        print(f"RESULT {single_ms(run, rows)}", flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
