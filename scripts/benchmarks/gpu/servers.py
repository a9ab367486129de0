"""TTFT, ITL and throughput of a language model through Tandem and through ``vllm serve``."""

import argparse
import contextlib
import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks import token_times
from benchmarks.endpoint import Endpoint, TargetError
from benchmarks.engine.measure import COMPLETION_TOKENS, PROMPT_TOKENS, HttpSender, PromptMaker
from benchmarks.engine.servers import prepare_model
from benchmarks.report import CellValue, Report, Table, print_progress
from benchmarks.rounds import Summary, interleave, percentile
from benchmarks.targets.running import REAL_MODEL
from benchmarks.targets.tandem import tandem_with_pools
from benchmarks.targets.vllm import ServerOptions, vllm_serve

CLUSTER, VLLM = "tandem", "vllm serve"
MAX_MODEL_LEN = 2048
MAX_SEQS = 256
WARM_UP_S = 3.0
NUM_PROMPTS = 4096
"""Different prompts; more than a run sends, so that none is in the prefix cache."""
MAX_ROUNDS = 20
GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Cell:
    """One server with one number of streams in one round."""

    tokens_s: float
    ttft_ms_p50: float
    ttft_ms_p90: float
    itl_ms_p50: float
    itl_ms_p99: float
    client_share: float
    """Cores that the client used; near 1, it limits."""


class Start(Protocol):
    """Starts a server."""

    def __call__(self, model: str, kv_bytes: int, /) -> AbstractContextManager[Endpoint]: ...


@contextlib.contextmanager
def _tandem(model: str, kv_bytes: int) -> Iterator[Endpoint]:
    with tandem_with_pools({"generators": [generator(model, kv_bytes)]}, REAL_MODEL) as running:
        yield running.endpoint


def generator(model: str, kv_bytes: int) -> dict[str, Any]:
    """Return the configuration of one replica on one GPU."""
    return {
        "name": REAL_MODEL,
        "model": model,
        "max_model_len": MAX_MODEL_LEN,
        "kv_cache_memory_bytes": kv_bytes,
        "engine_args": {"max_num_seqs": MAX_SEQS},
        "max_in_flight": MAX_SEQS,
        "replicas": {"min": 1, "max": 1},
        "resources": {"cpus": 1, "gpus": 1},
    }


@contextlib.contextmanager
def _vllm(model: str, kv_bytes: int) -> Iterator[Endpoint]:
    arguments = {
        "--max-model-len": MAX_MODEL_LEN,
        "--max-num-seqs": MAX_SEQS,
        "--kv-cache-memory-bytes": kv_bytes,
    }
    words = tuple(str(word) for word in itertools.chain(*arguments.items()))
    options = ServerOptions((*words, "--disable-uvicorn-access-log"))
    with vllm_serve(model, options) as ready:
        yield ready.running.endpoint


SERVERS: Mapping[str, Start] = {CLUSTER: _tandem, VLLM: _vllm}

Results = dict[tuple[str, int], list[Cell]]


def run(args: argparse.Namespace, deadline: float, start: Mapping[str, Start] = SERVERS) -> Report:
    """Measure the servers in rounds while there is time for another one, at least once.

    Raises:
        TargetError: No server could be measured.
    """
    model = args.model or prepare_model()
    prompts = PromptMaker.from_model(Path(model)).make_prompts(NUM_PROMPTS, "gpu")
    results: Results = defaultdict(list)
    failures: list[str] = []
    began = time.monotonic()
    names = list(start)
    for number, name in interleave(names, MAX_ROUNDS):
        spent_s = time.monotonic() - began
        if number and time.monotonic() + spent_s / number / len(names) > deadline:
            break
        try:
            with start[name](model, args.kv_gib * GIB) as endpoint:
                for streams in args.concurrent:
                    cell = measure(endpoint, prompts, streams, args.seconds)
                    results[name, streams].append(cell)
                    text = f"{streams:>4} streams {cell.tokens_s:8.0f} tokens/s"
                    print_progress(number, name, f"{text}, TTFT {cell.ttft_ms_p50:.1f} ms")
        except TargetError as error:
            failures.append(f"{name} failed in round {number + 1}: {error}")
            print_progress(number, name, f"failed: {error}")
            if len(failures) >= len(names):
                break
    if not results:
        raise TargetError("; ".join(failures))
    return make_report(results, failures)


def measure(endpoint: Endpoint, prompts: list[str], streams: int, seconds: float) -> Cell:
    """Keep a number of streams open for some seconds."""
    sender = HttpSender(endpoint)
    load = token_times.StreamLoad(
        (sender.encode(prompt) for prompt in itertools.cycle(prompts)),
        streams,
        pause_s=0,
        warm_up_s=WARM_UP_S,
        measured_s=seconds,
    )
    times = token_times.measure(endpoint, load)
    if not times.ttft_s or not times.itl_s:
        raise TargetError(f"No stream ended within {seconds:g} s.")
    ttft_ms, itl_ms = ([s * 1e3 for s in values] for values in (times.ttft_s, times.itl_s))
    return Cell(
        tokens_s=times.num_tokens / times.wall_s,
        ttft_ms_p50=percentile(ttft_ms, 50),
        ttft_ms_p90=percentile(ttft_ms, 90),
        itl_ms_p50=percentile(itl_ms, 50),
        itl_ms_p99=percentile(itl_ms, 99),
        client_share=times.client_cpu_s / times.wall_s,
    )


_FIELDS = ("tokens_s", "ttft_ms_p50", "ttft_ms_p90", "itl_ms_p50", "itl_ms_p99", "client_share")


def make_report(results: Results, failures: list[str]) -> Report:
    """Return the ratios of Tandem to ``vllm serve``, and all figures."""
    keys: dict[str, Summary] = {}
    rows: list[list[CellValue]] = []
    for (name, streams), cells in results.items():
        found = {field: Summary(tuple(getattr(c, field) for c in cells)) for field in _FIELDS}
        rows.append([f"{name}, {streams}", *found.values()])
        peers = results.get((VLLM, streams), [])
        num = min(len(cells), len(peers))  # rounds that both have
        if name == CLUSTER and num:
            ours, theirs = cells[:num], peers[:num]
            for field in ("tokens_s", "ttft_ms_p50", "itl_ms_p50"):
                values = (
                    getattr(a, field) / getattr(b, field) for a, b in zip(ours, theirs, strict=True)
                )
                keys[f"gpu_{field}_vs_vllm_at_{streams}"] = Summary(tuple(values))
    title = f"{PROMPT_TOKENS} prompt and {COMPLETION_TOKENS} completion tokens, on one GPU"
    columns = ("server, streams", "tokens/s", "TTFT p50 ms", "p90", "ITL p50 ms", "p99", "client")
    return Report(
        keys=keys,
        tables=[Table(title, columns, rows)],
        details={"servers": {f"{name} at {n}": cells for (name, n), cells in results.items()}},
        notes=["client: cores that the client used; near 1, it limits.", *failures],
    )
