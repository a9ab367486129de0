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
        load = [
            asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(REQUESTS)
        ]
        try:
            until = time.monotonic() + LOAD_S
            while time.monotonic() < until:
                pool = (await http.get("/ready")).json()["pools"]["smollm2"]
                assert pool["replicas"] == 1
                await asyncio.sleep(0.5)
            # The pool in ``/ready`` has no replicas that are starting.
            deployments = (await asyncio.to_thread(cluster.status))["application"]["deployments"]
            (found,) = (each for each in deployments if each["name"] == "generator-smollm2")
            states = [each["state"] for each in found["replicas"] if each["state"] != "STOPPING"]
            assert (found["target"], states) == (1, ["RUNNING"]), found
            # Whether the pool wants another replica depends on what it has learned in other tests.
            decisions = (await http.get("/dashboard/data")).json()["decisions"] or ()
            for each in decisions:
                if each["cause"] == "cores":
                    assert each["reason"].endswith("no free cores for another replica")
        finally:
            for request in load:
                request.cancel()
            await asyncio.gather(*load, return_exceptions=True)
