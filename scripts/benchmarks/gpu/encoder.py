"""Rate of bfloat16 matrix products, and the classifier's operations per second.

Both run in a child process, so that the card's memory is free for the servers afterwards.
"""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks.endpoint import TargetError
from benchmarks.report import CellValue, Report, Table, print_progress
from benchmarks.rounds import Summary
from cluster.config import ClassifierConfig, ResourcesConfig
from cluster.launch.gpus import count_gpus
from cluster.models.store import resolve

SIZES = (4096, 8192)
"""Rows and columns of the matrices; the fastest size counts."""
BATCHES = ((1, 128), (16, 128), (64, 128), (256, 32), (16, 512))
"""Texts and tokens of each."""
MAX_TOKENS = max(texts * length for texts, length in BATCHES)
REPEATS = 5
"""Measurements, the best of which counts for the matrices; the medians are shown for batches."""
RUN_S = 0.3
TIMEOUT_S = 180.0
TERA = 1e12


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a BERT."""

    layers: int
    width: int
    inner: int

    def flops(self, texts: int, length: int) -> float:
        """Return the operations of a batch: linear layers, and attention within each text.

        A multiplication and an addition count as two. Embeddings, norms and heads do not count.
        """
        linear = 2 * (4 * self.width**2 + 2 * self.width * self.inner)
        attention = 4 * length * self.width
        return float(self.layers * texts * length * (linear + attention))


@dataclass(frozen=True, slots=True)
class EncoderResult:
    """Rates of one card."""

    device: str
    matmul_flops_s: float
    texts_s: dict[tuple[int, int], tuple[float, ...]]
    """Texts per second by batch, one rate per repeat."""
    shape: Shape


def require_gpu() -> None:
    """Raise TargetError without a GPU."""
    if not count_gpus():
        raise TargetError("No GPU found (NVML). Run this on a machine with an NVIDIA GPU.")


def run(classifier: str, *, quick: bool) -> Report:
    """Measure in a child process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        repeats = 1 if quick else REPEATS
        future = pool.submit(measure, resolve(classifier), "cuda", repeats)
        try:
            result = future.result(TIMEOUT_S)
        except TimeoutError:
            for child in multiprocessing.active_children():  # the pool would wait for it
                child.kill()
            raise TargetError(f"The encoder took over {TIMEOUT_S} s.") from None
    print_progress(0, "encoder", f"matmul {result.matmul_flops_s / TERA:.0f} TFLOP/s")
    return make_report(result)


def measure(
    path: str, device: str, repeats: int, sizes: tuple[int, ...] = SIZES, run_s: float = RUN_S
) -> EncoderResult:
    """Measure the matrix products, then each batch of the model in the directory ``path``."""
    import torch
    from transformers import AutoConfig

    rate = max(_matmul_rate(torch, device, size, run_s) for size in sizes for _ in range(repeats))
    is_gpu = device == "cuda"
    config = ClassifierConfig(
        name="encoder", model=path, resources=ResourcesConfig(gpus=1 if is_gpu else 0)
    )
    model = _load(config, path)
    hf = AutoConfig.from_pretrained(path)
    rates = {batch: _text_rates(model, batch, hf.vocab_size, repeats, run_s) for batch in BATCHES}
    name = torch.cuda.get_device_name() if is_gpu else "CPU"
    shape = Shape(hf.num_hidden_layers, hf.hidden_size, hf.intermediate_size)
    return EncoderResult(name, rate, rates, shape)


def _load(config: ClassifierConfig, path: str) -> Any:
    from cluster.engines.classifier.model.load import load_model

    model = load_model(config, path).model
    if hasattr(model, "prepare"):
        model.prepare(["classify"], MAX_TOKENS)
    return model


def _matmul_rate(torch: Any, device: str, size: int, run_s: float) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.matmul(a, b, out=out)

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * size**3 * _rate(multiply, synchronize, run_s)


def _text_rates(
    model: Any, batch: tuple[int, int], vocabulary: int, repeats: int, run_s: float
) -> tuple[float, ...]:
    import numpy as np

    texts, length = batch
    random = np.random.default_rng(0)
    ids = [random.integers(0, vocabulary, length) for _ in range(texts)]
    # Results are copied to the host, so each call ends with the batch.
    rates = (_rate(lambda: model.run("classify", ids), lambda: None, run_s) for _ in range(repeats))
    return tuple(texts * rate for rate in rates)


def _rate(call: Callable[[], object], synchronize: Callable[[], None], run_s: float) -> float:
    """Return calls per second, after a first call that does not count."""
    call()
    synchronize()
    number, chunk, began = 0, 1, time.perf_counter()
    while True:
        for _ in range(chunk):
            call()
        synchronize()
        number += chunk
        if (took_s := time.perf_counter() - began) >= run_s:
            return number / took_s
        chunk *= 2  # so that waiting for the device takes little time


def make_report(result: EncoderResult) -> Report:
    """Return the share of the matrix products' rate that each batch reaches."""
    keys = {"matmul_bf16_tflops": Summary((result.matmul_flops_s / TERA,))}
    rows: list[list[CellValue]] = []
    for (texts, length), rates in result.texts_s.items():
        per_text = result.shape.flops(1, length)
        share = Summary(tuple(rate * per_text / result.matmul_flops_s for rate in rates))
        keys[f"encoder_matmul_share_{texts}x{length}"] = share
        tera = Summary(tuple(rate * per_text / TERA for rate in rates))
        rows.append([f"{texts} x {length}", Summary(rates), tera, share])
    title = f"Classifier on {result.device}, bfloat16, one batch at a time, copies included"
    return Report(
        keys=keys,
        tables=[Table(title, ("texts x tokens", "texts/s", "TFLOP/s", "share of matmul"), rows)],
        details={
            "encoder": {
                "device": result.device,
                "texts_s": {f"{a}x{b}": rates for (a, b), rates in result.texts_s.items()},
            }
        },
        notes=[
            f"matmul: the fastest of {len(SIZES)} sizes of square matrices. Operations are those "
            "of linear layers and attention."
        ],
    )
