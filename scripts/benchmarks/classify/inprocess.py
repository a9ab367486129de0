"""What one process computes without HTTP: the engine's model, transformers, and its pipeline.

Runs as ``python -m benchmarks.classify.inprocess MODEL_DIR``: reads the name of a measurement from
each line of its input and answers with a number on a line. All models stay loaded; the texts are
tokenized beforehand, except for the pipeline.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from benchmarks.classify import texts
from cluster.config import ClassifierConfig
from cluster.engines.encoder.build import Builder
from cluster.engines.encoder.jobs import TokenIds
from cluster.engines.encoder.pooling import Pooling
from cluster.engines.encoder.tokenizer import TextTokenizer

NUM_TEXTS = 1024
BATCH = 32
BUDGET_TOKENS = 1024
"""The engine's own batches."""
SINGLES = 60
Batch = Sequence[TokenIds]
Run = Callable[[Batch], Any]


class InProcess:
    """Every model, loaded on first use."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._texts = texts.load(NUM_TEXTS)
        self._network = AutoModelForSequenceClassification.from_pretrained(path).eval()
        self._encoder = TextTokenizer(self._tokenizer, 512)
        self._ids = self._encoder.encode(self._texts, 0, "right")
        self._models: dict[str, Run] = {}

    def measure(self, name: str) -> float:
        """``tokens``; ``fp32``, ``bf16``, ``int8`` or ``hf-…`` with ``fifo``, ``sorted`` or
        ``single``: texts a second, or the milliseconds of one text; ``pipeline``."""
        if name == "tokens":
            return statistics.fmean(map(len, self._ids))
        if name == "pipeline":
            return self._pipeline()
        model, _, order = name.partition(" ")
        run = self._models.setdefault(model, self._model(model))
        if order == "single":
            return self._single(run)
        batches = self._fifo() if order == "fifo" else self._sorted()
        return _rate(lambda: [run(batch) for batch in batches], len(self._ids))

    def _model(self, name: str) -> Run:
        if name.startswith("hf-"):
            dtype = {"hf-fp32": torch.float32, "hf-bf16": torch.bfloat16}[name]
            network = AutoModelForSequenceClassification.from_pretrained(self._path, dtype=dtype)
            return _padded(network.eval())
        dtype_name = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}[name]
        config = ClassifierConfig(
            name="bench", model=self._path, dtype=dtype_name, tasks=("classify",)
        )
        builder = Builder(config, self._path, self._network, self._encoder, Pooling())
        model = builder.build().model
        return lambda batch: model.run("classify", batch)

    def _fifo(self) -> list[Batch]:
        ids = self._ids
        return [sorted(ids[i : i + BATCH], key=len) for i in range(0, len(ids), BATCH)]

    def _sorted(self) -> list[Batch]:
        batches: list[list[TokenIds]] = [[]]
        for row in sorted(self._ids, key=len):
            if sum(map(len, batches[-1])) + len(row) > BUDGET_TOKENS:
                batches.append([])
            batches[-1].append(row)
        return list(batches)

    def _single(self, run: Run) -> float:
        found = []
        for row in self._ids[:SINGLES]:
            begun = time.perf_counter()
            run([row])
            found.append(time.perf_counter() - begun)
        return statistics.median(found) * 1e3

    def _pipeline(self) -> float:
        classify = pipeline("text-classification", model=self._path, device="cpu", top_k=None)
        some = self._texts[: NUM_TEXTS // 2]
        return _rate(lambda: classify(some, batch_size=BATCH), len(some))


def _rate(work: Callable[[], Any], num_texts: int, at_least_s: float = 2.0) -> float:
    work()
    begun = time.perf_counter()
    done = 0
    while (spent := time.perf_counter() - begun) < at_least_s:
        work()
        done += num_texts
    return done / spent


def _padded(network: Any) -> Run:
    """Padded to the longest, as a loop around transformers does it."""

    @torch.inference_mode()
    def run(batch: Batch) -> Any:
        cells = np.zeros((len(batch), max(map(len, batch))), np.int64)
        mask = np.zeros_like(cells)
        for row, ids in enumerate(batch):
            cells[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        tokens, attention = torch.from_numpy(cells), torch.from_numpy(mask)
        return network(input_ids=tokens, attention_mask=attention).logits.float().softmax(-1)

    return run


def _main(path: str) -> None:
    worker = InProcess(path)
    for line in sys.stdin:
        print(f"RESULT {worker.measure(line.strip())}", flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
