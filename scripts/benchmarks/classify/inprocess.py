"""Classification without a server: our engine's model, transformers, and its pipeline.

Runs as ``python -m benchmarks.classify.inprocess MODEL_DIR``: each line on stdin names a
measurement, each line on stdout is its result. All models stay loaded. Texts are tokenized in
advance, except for the pipeline. Each model runs with all cores on one batch and with one core per
batch; the faster way counts.
"""

import itertools
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from benchmarks.classify import texts
from cluster.batching import Batcher
from cluster.config import ClassifierConfig
from cluster.engines.classifier.model.build import ModelBuilder
from cluster.engines.classifier.model.outputs import Pooling
from cluster.engines.classifier.model.packed.cpu import PackedBert
from cluster.engines.classifier.model.tokenizer import TextTokenizer
from cluster.engines.classifier.model.types import TokenIds
from cluster.memory import release_free_memory, use_huge_pages

NUM_TEXTS = 1024
BATCH = 32
CORES = len(os.sched_getaffinity(0))
BUDGET_TOKENS = 1024
"""Token budget of the engine's batches."""
NUM_SINGLES = 60
"""Texts whose latency is measured one by one."""
SINGLE_TURNS = 3
"""Measured passes over these texts."""
CPU = " CPU"
Batch = Sequence[TokenIds]
Run = Callable[[Batch], Any]


class InProcess:
    """Models to measure, loaded on first use."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._texts = texts.load(NUM_TEXTS)
        self._network = AutoModelForSequenceClassification.from_pretrained(path).eval()
        self._text_tokenizer = TextTokenizer(self._tokenizer, 512)
        self._ids = self._text_tokenizer.encode(self._texts, 0, "right")
        self._models: dict[str, Run] = {}
        self._cpu_s: dict[str, float] = {}

    def measure(self, name: str) -> float:
        """Return the result of a measurement.

        ``MODEL fifo`` and ``MODEL sorted`` are texts per second in arrival order and sorted by
        length, and ``MODEL sorted CPU`` the CPU seconds that 1,000 texts of the latest such
        measurement took; ``MODEL single`` is the latency of one text in ms; ``MODEL agreement`` is
        the share of labels equal to float32's; ``MODEL accuracy`` is the share of correct labels.
        MODEL is fp32, bf16, int8 or, for transformers, hf-fp32 or hf-bf16. ``tokens`` is the mean
        length of a text; ``pipeline`` is texts per second; ``padding waste`` is a share.
        """
        if name == "tokens":
            return statistics.fmean(map(len, self._ids))
        if name == "pipeline":
            return self._pipeline_rate()
        if name == "padding waste":
            return self._padding_waste()
        if name.endswith(CPU):
            return self._cpu_s[name.removesuffix(CPU)]
        torch.set_num_threads(CORES)
        model, _, order = name.partition(" ")
        run = self._get_model(model)
        if order == "single":
            return single_ms(run, self._ids[:NUM_SINGLES])
        if order == "agreement":
            return float(np.mean(self._labels(run) == self._labels(self._get_model("fp32"))))
        if order == "accuracy":
            truth = np.array([positive for _, positive in texts.load_labelled(NUM_TEXTS)])
            return float(np.mean(self._labels(run) == truth))
        batches = self._fifo_batches() if order == "fifo" else self._sorted_batches()
        rates = (_rate_of_threads(run, batches, 1), _rate_of_threads(run, batches, CORES))
        rate, self._cpu_s[name] = max(rates)
        return rate

    def _get_model(self, name: str) -> Run:
        if name not in self._models:
            self._models[name] = self._load_model(name)
        return self._models[name]

    def _labels(self, run: Run) -> NDArray[np.intp]:
        order = sorted(range(len(self._ids)), key=lambda index: len(self._ids[index]))
        labels = np.empty(len(order), np.intp)
        for first in range(0, len(order), BATCH):
            some = order[first : first + BATCH]
            labels[some] = np.asarray(run([self._ids[index] for index in some])).argmax(1)
        return labels

    def _load_model(self, name: str) -> Run:
        if name.startswith("hf-"):
            dtype = {"hf-fp32": torch.float32, "hf-bf16": torch.bfloat16}[name]
            network = AutoModelForSequenceClassification.from_pretrained(self._path, dtype=dtype)
            return _with_padding(network.eval())
        config = ClassifierConfig(name="bench", model=self._path, tasks=("classify",))
        builder = ModelBuilder(config, self._path, self._network, self._text_tokenizer, Pooling())
        model = builder.build_unchecked(
            {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}[name]
        )
        release_free_memory()
        use_huge_pages()  # as the engine does
        return lambda batch: model.run("classify", batch)

    def _fifo_batches(self) -> list[Batch]:
        ids = self._ids
        return [sorted(ids[i : i + BATCH], key=len) for i in range(0, len(ids), BATCH)]

    def _sorted_batches(self) -> list[Batch]:
        batches: list[list[TokenIds]] = [[]]
        for row in sorted(self._ids, key=len):
            if sum(map(len, batches[-1])) + len(row) > BUDGET_TOKENS:
                batches.append([])
            batches[-1].append(row)
        return list(batches)

    def _padding_waste(self) -> float:
        """Return the share of computed positions that are padding, in the engine's batches."""
        batcher = Batcher[int](BUDGET_TOKENS)
        for number in range(0, len(self._ids), BATCH):
            lengths = [len(row) for row in self._ids[number : number + BATCH]]
            batcher.add_request(number, "classify", lengths)
        model = PackedBert(self._network)
        while batch := batcher.cut_batch():
            model.run("classify", [self._ids[item.key + item.index] for item in batch.items])
        return model.padding / (model.padding + sum(map(len, self._ids)))

    def _pipeline_rate(self) -> float:
        classify = pipeline("text-classification", model=self._path, device="cpu", top_k=None)
        some = self._texts[: NUM_TEXTS // 4]
        classify(some[:BATCH], batch_size=BATCH)
        began = time.perf_counter()
        classify(some, batch_size=BATCH)
        return len(some) / (time.perf_counter() - began)


def single_ms(run: Run, rows: Sequence[TokenIds]) -> float:
    """Return the median latency of one text, after one pass that compiles what lengths need."""
    latencies_s = []
    for turn in range(1 + SINGLE_TURNS):
        for row in rows:
            began = time.perf_counter()
            run([row])
            if turn:
                latencies_s.append(time.perf_counter() - began)
    return statistics.median(latencies_s) * 1e3


def _rate_of_threads(
    run: Run, batches: Sequence[Batch], count: int, seconds: float = 2.0
) -> tuple[float, float]:
    """Return texts per second, and CPU seconds per 1,000 texts, of threads that share the cores."""
    turns, done = itertools.count(), [0] * count
    end = cpu_s = 0.0

    def work(number: int) -> None:
        torch.set_num_threads(CORES // count)
        while time.perf_counter() < end:
            batch = batches[next(turns) % len(batches)]
            run(batch)
            done[number] += len(batch)

    for part in (seconds / 4, seconds):  # the first run warms up
        turns, done, began = itertools.count(), [0] * count, time.perf_counter()
        end, cpu_s = began + part, time.process_time()
        threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    cpu_s = time.process_time() - cpu_s
    return sum(done) / (time.perf_counter() - began), cpu_s / sum(done) * 1e3


def _with_padding(network: Any) -> Run:
    """Wrap a network so that each batch is padded to its longest text, as usual."""

    @torch.inference_mode()
    def run(batch: Batch) -> Any:
        padded = np.zeros((len(batch), max(map(len, batch))), np.int64)
        mask = np.zeros_like(padded)
        for row, ids in enumerate(batch):
            padded[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        tokens, attention = torch.from_numpy(padded), torch.from_numpy(mask)
        return network(input_ids=tokens, attention_mask=attention).logits.float().softmax(-1)

    return run


def _main(path: str) -> None:
    worker = InProcess(path)
    for line in sys.stdin:
        print(f"RESULT {worker.measure(line.strip())}", flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
