"""``bench gpu`` without a GPU: the encoder on a CPU, scripted servers, and reports."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.__main__ import make_parser
from benchmarks.endpoint import Endpoint, TargetError
from benchmarks.gpu import encoder, servers
from benchmarks.report import Report
from cluster.config import GeneratorConfig

SHAPE = encoder.Shape(layers=6, width=384, inner=1536)


def parse(*options: str) -> Any:
    return make_parser().parse_args(["gpu", *options])


def test_operations_of_a_batch() -> None:
    # Six layers of 12 width^2 weights, and attention of 128 tokens with each other.
    assert SHAPE.flops(1, 128) == 6 * 128 * (2 * 12 * 384**2 + 4 * 128 * 384)
    assert SHAPE.flops(64, 128) == 64 * SHAPE.flops(1, 128)


def test_the_share_of_the_matmul_rate_is_reported() -> None:
    rate = SHAPE.flops(64, 128)
    result = encoder.EncoderResult("card", rate * 10, {(64, 128): (64.0, 128.0, 192.0)}, SHAPE)
    report = encoder.make_report(result)
    assert report.keys["encoder_matmul_share_64x128"].rounds == pytest.approx((0.1, 0.2, 0.3))
    assert report.keys["matmul_bf16_tflops"].median == pytest.approx(rate * 10 / 1e12)


def test_one_replica_reserves_the_gpu() -> None:
    config = GeneratorConfig.model_validate(servers.generator("m", 2**30))
    assert config.resources.gpus == 1
    assert config.replicas.max == 1


def make_model(directory: Path) -> str:
    words = {f"Ġ{word}": i for i, word in enumerate(("alpha", "bravo", "charlie"))}
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    return str(directory)


def test_rounds_end_with_the_time_and_failed_servers_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[str] = []

    def cell(endpoint: Endpoint, _prompts: object, streams: int, _seconds: float) -> servers.Cell:
        return servers.Cell(streams * endpoint.port, 20.0 / endpoint.port, 1, 1, 1, 0.1)

    def start(name: str, port: int) -> servers.Start:
        @contextlib.contextmanager
        def server(_model: str, _kv_bytes: int, /) -> Iterator[Endpoint]:
            started.append(name)
            if started.count(name) > 1:
                raise TargetError("out of memory")
            yield Endpoint(port, "m")

        return server

    monkeypatch.setattr(servers, "measure", cell)
    both = {servers.CLUSTER: start(servers.CLUSTER, 2), servers.VLLM: start(servers.VLLM, 4)}
    args = parse("--model", make_model(tmp_path), "--concurrent", "8")
    report = servers.run(args, time.monotonic() + 3600, both)
    assert report.keys["gpu_tokens_s_vs_vllm_at_8"].rounds == (0.5,)
    assert report.keys["gpu_ttft_ms_p50_vs_vllm_at_8"].rounds == (2.0,)
    assert sum("out of memory" in note for note in report.notes) == 2
    started.clear()
    servers.run(args, time.monotonic(), both)  # the time is over: one round
    assert len(started) == 2


def test_a_failed_part_does_not_lose_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Report:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(encoder, "require_gpu", lambda: None)
    monkeypatch.setattr(encoder, "run", fail)
    found = Report({}, notes=["measured"])
    monkeypatch.setattr(servers, "run", lambda args, deadline: found)
    report = gpu.run(parse("--quick"))
    assert report.notes == ["encoder failed: RuntimeError('no kernel')", "measured"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "count_gpus", lambda: 0)
    with pytest.raises(TargetError, match="No GPU found"):
        gpu.run(parse())
