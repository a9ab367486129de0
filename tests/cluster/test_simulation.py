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


def write_trace(path: Path, requests: int = 70, rate: float = 6.0) -> None:
    """Write a trace with queueing, in which most prompts share a prefix."""
    rng, at_s, lines = random.Random(4), 0.0, []
    for number in range(requests):
        at_s += rng.expovariate(rate)
        family = rng.randrange(6)
        blocks = list(range(100 * family, 100 * family + 2 + family % 3))
        if rng.random() >= 0.7:
            blocks = []
        blocks += range(10_000 + 10 * number, 10_000 + 10 * number + rng.randrange(2))
        request = {
            "timestamp": 1000 * at_s,
            "input_length": len(blocks) * MOONCAKE_BLOCK + rng.randint(20, 400),
            "output_length": rng.randint(5, 40),
            "hash_ids": blocks,
        }
        lines.append(json.dumps(request))
    path.write_text("\n".join(lines), encoding="utf-8")


def hit_rate(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    cached, prompts = (
        float(line.split()[-1])
        for name in ("cached", "prompt")
        for line in lines
        if line.startswith(f'tandem_{name}_tokens_total{{model="replayed"')
    )
    return cached / prompts


async def test_the_simulator_predicts_the_clusters_latencies_and_hit_rate(
    sims: RunningCluster, tmp_path: Path
) -> None:
    file, trace = tmp_path / "config.json", tmp_path / "trace.jsonl"
    config = serve_config(generators=[REPLAYED], router=router_config(1))
    file.write_text(json.dumps(config), encoding="utf-8")
    write_trace(trace)
    done = sims.tandem("simulate", "--trace", str(trace), "--config", str(file), "--json")
    assert done.returncode == 0, done.stderr
    predicted = json.loads(done.stdout)
    live = Replay(sims.http_url, "replayed")
    await live.run(read_trace(trace))
    measured = {
        f"{name}_p{percent}_s": histogram.percentile(percent)
        for name, histogram in (("ttft", live.ttft_s), ("itl", live.itl_s))
        for percent in (50, 90)
    }
    assert measured["ttft_p50_s"] > 1, "requests of this trace must wait"
    assert {name: predicted[name] for name in measured} == pytest.approx(measured, rel=0.15)
    assert predicted["hit_rate"] == pytest.approx(hit_rate(sims.http_url), rel=0.15)
