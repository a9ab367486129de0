"""``tandem simulate`` beside a live cluster: one trace, one configuration, the same percentiles.

Steps take 60 ms and more and requests wait for seconds, so what the machine adds is small; nothing
that is compared lies at a point where a little more time would change much.
"""

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.simulation.histogram import Histogram
from cluster.simulation.requests import TraceRequest
from cluster.simulation.trace_files import MOONCAKE_BLOCK, read_trace
from tests.cluster.conftest import Running, router_of, serve_config, sim_generator

REPLICAS = 2


def config() -> dict[str, Any]:
    sim = sim_generator(
        sim={
            "prefill_s_per_token": 2e-4,
            "decode_s_per_token": 0.06,
            "batch_slowdown": 0.05,
            "max_num_seqs": 6,
        },
        max_ongoing=8,
        replicas={"min": REPLICAS, "max": REPLICAS},
    )
    return serve_config(generators=[sim], router=router_of(1))


def write_trace(path: Path, requests: int = 70, rate: float = 6.0) -> None:
    """More than the replicas can serve at once; most prompts begin as others do."""
    drawn, at_s, lines = random.Random(4), 0.0, []
    for number in range(requests):
        at_s += drawn.expovariate(rate)
        family = drawn.randrange(6)
        blocks = list(range(100 * family, 100 * family + 2 + family % 3))
        if drawn.random() >= 0.7:
            blocks = []
        blocks += range(10_000 + 10 * number, 10_000 + 10 * number + drawn.randrange(2))
        request = {
            "timestamp": 1000 * at_s,
            "input_length": len(blocks) * MOONCAKE_BLOCK + drawn.randint(20, 400),
            "output_length": drawn.randint(5, 40),
            "hash_ids": blocks,
        }
        lines.append(json.dumps(request))
    path.write_text("\n".join(lines), encoding="utf-8")


def prompt(number: int, request: TraceRequest) -> str:
    """A text of so many tokens, of four bytes each, that begins as the trace's blocks say."""
    parts = [(str(block), MOONCAKE_BLOCK) for block in request.blocks]
    parts.append((f"own {number}", request.prompt_tokens - len(parts) * MOONCAKE_BLOCK))
    return "".join(
        f" {word:03x}"
        for seed, tokens in parts
        for word in random.Random(seed).choices(range(4096), k=tokens)
    )


class Replay:
    """Sends a trace over HTTP, each request when it is due, and measures as a client does."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.ttft_s, self.itl_s = Histogram(), Histogram()

    async def run(self, requests: list[TraceRequest]) -> None:
        bodies = [prompt(*numbered) for numbered in enumerate(requests)]
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, limits=limits, timeout=60) as http:
            began_s = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                for request, text in zip(requests, bodies, strict=True):
                    await asyncio.sleep(began_s + request.arrival_s - time.monotonic())
                    tasks.create_task(self._one(http, request, text))

    async def _one(self, http: httpx.AsyncClient, request: TraceRequest, text: str) -> None:
        body = {
            "model": "sim",
            "prompt": text,
            "max_tokens": request.completion_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        last_s, gaps, usage = time.monotonic(), [], None
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk, now_s = json.loads(line.removeprefix("data: ")), time.monotonic()
                if chunk["choices"]:
                    gaps.append(now_s - last_s)
                    last_s = now_s
                usage = chunk.get("usage") or usage
        assert usage is not None
        assert usage["prompt_tokens"] == request.prompt_tokens
        assert usage["completion_tokens"] == len(gaps) == request.completion_tokens
        self.ttft_s.add(gaps[0])
        for gap_s in gaps[1:]:
            self.itl_s.add(gap_s)


def hit_rate(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    cached, prompts = (
        float(line.split()[-1])
        for name in ("cached", "prompt")
        for line in lines
        if line.startswith(f'tandem_{name}_tokens_total{{model="sim"')
    )
    return cached / prompts


async def test_the_simulator_says_what_the_cluster_does(sims: Running, tmp_path: Path) -> None:
    file, trace = tmp_path / "config.json", tmp_path / "trace.jsonl"
    file.write_text(json.dumps(config()), encoding="utf-8")
    write_trace(trace)
    done = sims.tandem("simulate", "--trace", str(trace), "--config", str(file), "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    live = Replay(sims.http_url)
    await live.run(list(read_trace(trace).requests))
    measured = {
        f"{name}_p{percent}_s": found.percentile(percent)
        for name, found in (("ttft", live.ttft_s), ("itl", live.itl_s))
        for percent in (50, 90)
    }
    assert measured["ttft_p50_s"] > 1, "the trace was to keep requests waiting"
    assert {name: said[name] for name in measured} == pytest.approx(measured, rel=0.15)
    assert said["hit_rate"] == pytest.approx(hit_rate(sims.http_url), rel=0.15)
