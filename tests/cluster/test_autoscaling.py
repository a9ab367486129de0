"""Twenty-four simulated replicas in one cluster: traffic goes up by eight times and back."""

import asyncio
import time
from collections import Counter
from typing import Any

import httpx
import pytest

from tests.cluster.conftest import RunningCluster, router_config, serve_config, sim_generator

BODY = {"model": "sim", "prompt": "a b c", "max_tokens": 50, "stream": True}
MAX_REPLICAS = 24
STREAMS = 24


def config() -> dict[str, Any]:
    sim = sim_generator(
        sim={"decode_s_per_token": 0.04, "batch_slowdown": 0.05},
        max_in_flight=32,
        slo={"ttft_p90_s": 2.0, "itl_p90_s": 0.07},
        replicas={
            "min": 0,
            "max": MAX_REPLICAS,
            "target_in_flight": 8,
            "upscale_delay_s": 0,
            "downscale_delay_s": 15,
        },
        resources={"cpus": 0.01},
    )
    router = router_config(2, resources={"cpus": 0.01}, max_queued=1000)
    return serve_config(generators=[sim], router=router)


class Traffic:
    """So many streams at a time, which can be changed; counts how they ended."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._streams: list[asyncio.Task[None]] = []
        self._wanted = 0
        self.ends: Counter[str] = Counter()

    async def set(self, streams: int) -> None:
        self._wanted = streams
        for number in range(len(self._streams), streams):
            self._streams.append(asyncio.create_task(self._stream(number)))
        if streams < len(self._streams):
            ending, self._streams = self._streams[streams:], self._streams[:streams]
            await asyncio.gather(*ending)

    async def _stream(self, number: int) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=120) as http:
            while number < self._wanted:
                answer = await http.post("/v1/completions", json=BODY)
                whole = answer.text.count('"text"') == 50 and answer.text.endswith("[DONE]\n\n")
                self.ends["whole" if whole else f"{answer.status_code}: {answer.text[-200:]}"] += 1


def num_replicas(url: str) -> int:
    return int(httpx.get(f"{url}/ready", timeout=60).json()["pools"]["sim"]["replicas"])


async def until(url: str, low: int, high: int, timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    while not low <= (now := await asyncio.to_thread(num_replicas, url)) <= high:
        assert time.monotonic() < deadline, f"{now} replicas, not {low} to {high}"
        await asyncio.sleep(1)
    return now


@pytest.mark.timeout(900)
async def test_replicas_follow_eightfold_traffic_and_back_and_nothing_fails(
    sim_cluster: RunningCluster,
) -> None:
    traffic = Traffic(sim_cluster.http_url)
    await until(sim_cluster.http_url, 0, 0, 60)
    await traffic.set(STREAMS)  # the first ones wait for the first replica
    low = await until(sim_cluster.http_url, 2, 6, 120)
    await traffic.set(8 * STREAMS)
    await until(sim_cluster.http_url, 3 * low, MAX_REPLICAS, 300)
    await traffic.set(STREAMS)
    await until(sim_cluster.http_url, 1, 8, 300)
    await traffic.set(0)
    assert set(traffic.ends) == {"whole"}, traffic.ends
    await until(sim_cluster.http_url, 0, 0, 120)
