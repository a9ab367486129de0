"""``tandem simulate`` and a live cluster: same trace and configuration, same percentiles.

Steps take at least 60 ms and requests wait for seconds, so the machine's own latency is small. The
compared percentiles do not lie where a small delay would change them much.
"""

import json
import random
from pathlib import Path

import httpx
import pytest

from benchmarks.routing.replay import Replay
from cluster.simulation.trace_files import MOONCAKE_BLOCK, read_trace
from tests.cluster.conftest import REPLAYED, RunningCluster, router_config, serve_config

ATTEMPTS = 3
"""Replays, each with other prompts, of which one must be as predicted: a machine may stall."""


def write_trace(path: Path, first: int, requests: int = 70, rate: float = 6.0) -> None:
    """Write a trace with queueing, in which most prompts share a prefix.

    ``first`` is the lowest number of a block, so that prompts of other traces differ.
    """
    rng, at_s, lines = random.Random(4), 0.0, []
    for number in range(requests):
        at_s += rng.expovariate(rate)
        family = rng.randrange(6)
        blocks = list(range(first + 100 * family, first + 100 * family + 2 + family % 3))
        if rng.random() >= 0.7:
            blocks = []
        alone = first + 10_000 + 10 * number
        blocks += range(alone, alone + rng.randrange(2))
        request = {
            "timestamp": 1000 * at_s,
            "input_length": len(blocks) * MOONCAKE_BLOCK + rng.randint(20, 400),
            "output_length": rng.randint(5, 40),
            "hash_ids": blocks,
        }
        lines.append(json.dumps(request))
    path.write_text("\n".join(lines), encoding="utf-8")


def count_tokens(url: str) -> dict[str, float]:
    """Return the cached and all tokens of prompts so far."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return {
        name: sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith(f'tandem_{name}_tokens_total{{model="replayed"')
        )
        for name in ("cached", "prompt")
    }


async def test_the_simulator_predicts_the_clusters_latencies_and_hit_rate(
    sims: RunningCluster, tmp_path: Path
) -> None:
    file, trace = tmp_path / "config.json", tmp_path / "trace.jsonl"
    config = serve_config(generators=[REPLAYED], router=router_config(1))
    file.write_text(json.dumps(config), encoding="utf-8")
    for attempt in range(ATTEMPTS):
        write_trace(trace, first=attempt * 1_000_000)
        done = sims.tandem("simulate", "--trace", str(trace), "--config", str(file), "--json")
        assert done.returncode == 0, done.stderr
        predicted = json.loads(done.stdout)
        measured = await replay(sims.http_url, trace)
        assert measured["ttft_p50_s"] > 1, "requests of this trace must wait"
        expected = pytest.approx(measured, rel=0.15)
        if (found := {name: predicted[name] for name in measured}) == expected:
            return
    assert found == expected


async def replay(url: str, trace: Path) -> dict[str, float]:
    """Send the requests of a trace and return percentiles of their times, and the hit rate."""
    before = count_tokens(url)
    live = Replay(url, "replayed")
    await live.run(read_trace(trace))
    after = count_tokens(url)
    return {
        "hit_rate": (after["cached"] - before["cached"]) / (after["prompt"] - before["prompt"]),
        **{
            f"{name}_p{percent}_s": histogram.percentile(percent)
            for name, histogram in (("ttft", live.ttft_s), ("itl", live.itl_s))
            for percent in (50, 90)
        },
    }
