"""Autoscaling of the default deployment, whose vLLM replica computes on all cores of its node."""

import asyncio
import time

import httpx

from tests.cluster.conftest import RunningCluster

REQUESTS = 60
"""Almost twice the default ``target_in_flight``, which is 32."""
LOAD_S = 10.0
"""Time of load; reports, ``upscale_delay_s`` and a decision take 2 s each."""


async def test_load_adds_no_replica_without_free_cores(cluster: RunningCluster) -> None:
    body = {"model": "smollm2", "prompt": "Once", "max_tokens": 1000, "ignore_eos": True}
    limits = httpx.Limits(max_connections=REQUESTS + 1)
    async with httpx.AsyncClient(base_url=cluster.http_url, timeout=120, limits=limits) as http:
        before = (await http.get("/dashboard/data")).json()["decisions"] or ()
        load = [
            asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(REQUESTS)
        ]
        try:
            until = time.monotonic() + LOAD_S
            decisions: list[str] = []
            while time.monotonic() < until or not decisions:
                assert time.monotonic() < until + 60, "no decision was recorded"
                pool = (await http.get("/ready")).json()["pools"]["smollm2"]
                assert pool["replicas"] == 1
                data = (await http.get("/dashboard/data")).json()
                new = [each for each in data["decisions"] or () if each not in before]
                decisions = [each["reason"] for each in new if each["cause"] == "cores"]
                await asyncio.sleep(0.5)
            # The pool in ``/ready`` has no replicas that are starting.
            deployments = (await asyncio.to_thread(cluster.status))["application"]["deployments"]
            (found,) = (each for each in deployments if each["name"] == "generator-smollm2")
            states = [each["state"] for each in found["replicas"] if each["state"] != "STOPPING"]
            assert (found["target"], states) == (1, ["RUNNING"]), found
        finally:
            for request in load:
                request.cancel()
            await asyncio.gather(*load, return_exceptions=True)
    assert decisions[0].endswith("no free cores for another replica")
