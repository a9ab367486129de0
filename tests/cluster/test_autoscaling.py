"""Autoscaling of up to 24 simulated replicas: the load grows eightfold and shrinks again."""

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


class VariableLoad:
    """Concurrent streams whose number can be changed, and counts of how they ended."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._streams: list[asyncio.Task[None]] = []
        self._num_streams = 0
        self.ends: Counter[str] = Counter()

    async def set_streams(self, num: int) -> None:
        self._num_streams = num
        for number in range(len(self._streams), num):
            self._streams.append(asyncio.create_task(self._stream(number)))
        if num < len(self._streams):
            ending, self._streams = self._streams[num:], self._streams[:num]
            await asyncio.gather(*ending)

    async def _stream(self, number: int) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=120) as http:
            while number < self._num_streams:
                answer = await http.post("/v1/completions", json=BODY)
                complete = answer.text.count('"text"') == 50 and answer.text.endswith("[DONE]\n\n")
                end = "complete" if complete else f"{answer.status_code}: {answer.text[-200:]}"
                self.ends[end] += 1


def num_replicas(url: str) -> int:
    return int(httpx.get(f"{url}/ready", timeout=60).json()["pools"]["sim"]["replicas"])


async def wait_replicas(url: str, low: int, high: int, timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    while not low <= (now := await asyncio.to_thread(num_replicas, url)) <= high:
        assert time.monotonic() < deadline, f"{now} replicas, expected {low} to {high}"
        await asyncio.sleep(1)
    return now


@pytest.mark.timeout(900)
async def test_replicas_follow_the_load_and_no_request_fails(
    sim_cluster: RunningCluster,
) -> None:
    load = VariableLoad(sim_cluster.http_url)
    await wait_replicas(sim_cluster.http_url, 0, 0, 60)
    await load.set_streams(STREAMS)  # queued until the first replica has started
    # The ITL SLO allows 16 streams per replica: 0.04 s * (1 + 0.05 * 15) = 0.07 s. So 24 streams
    # need at least 2 replicas; the target of 8 in flight needs 3, and twice that is tolerated.
    low = await wait_replicas(sim_cluster.http_url, 2, 6, 120)
    await load.set_streams(8 * STREAMS)
    await wait_replicas(sim_cluster.http_url, 3 * low, MAX_REPLICAS, 300)
    await load.set_streams(STREAMS)
    await wait_replicas(sim_cluster.http_url, 1, 8, 300)
    await load.set_streams(0)
    assert set(load.ends) == {"complete"}, load.ends
    await wait_replicas(sim_cluster.http_url, 0, 0, 120)
