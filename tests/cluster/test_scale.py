"""Several routers and replicas of the simulated engine: spread, scaled, updated without a gap."""

import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.cluster.conftest import RunningCluster, router_config, serve_config, sim_generator

BODY = {"model": "sim", "prompt": "a b c", "max_tokens": 25, "stream": True}


def config(**generator: Any) -> dict[str, Any]:
    scaled = {
        "min": 1,
        "max": 3,
        "target_in_flight": 4,
        "upscale_delay_s": 0,
        "downscale_delay_s": 1,
    }
    fields = {"sim": {"decode_s_per_token": 0.02}, "max_in_flight": 16, "replicas": scaled}
    sim = sim_generator(**{**fields, **generator})
    beside = {
        "name": "beside",
        "route_prefix": "/beside",
        "import_path": "tests.cluster.unlinkable:build",
        "args": {
            "generators": [{**sim, "replicas": {"min": 1, "max": 1}}],
            "router": router_config(1),
        },
    }
    return serve_config(beside, generators=[sim], router=router_config(2, max_queued=200))


def num_replicas(http: httpx.Client) -> int:
    return int(http.get("/ready").json()["pools"]["sim"]["replicas"])


class Load:
    """So many streams at a time until told to stop; counts how they ended."""

    def __init__(self, url: str, streams: int) -> None:
        self._url = url
        self._streams = streams
        self.ends: Counter[str] = Counter()
        self.stop = asyncio.Event()

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=self._streams)
        async with httpx.AsyncClient(base_url=self._url, limits=limits, timeout=120) as http:
            await asyncio.gather(*(self._one(http) for _ in range(self._streams)))

    async def _one(self, http: httpx.AsyncClient) -> None:
        while not self.stop.is_set():
            answer = await http.post("/v1/completions", json=BODY)
            whole = answer.text.count('"text"') == 25 and answer.text.endswith("[DONE]\n\n")
            self.ends["whole" if whole else f"{answer.status_code}: {answer.text[-200:]}"] += 1


@asynccontextmanager
async def unbroken_load(url: str, streams: int) -> AsyncIterator[None]:
    """Streams go on inside; each of them must end whole."""
    load = Load(url, streams)
    running = asyncio.create_task(load.run())
    yield
    load.stop.set()
    await running
    assert set(load.ends) == {"whole"}, load.ends


@asynccontextmanager
async def asked_all_along(url: str, model: str) -> AsyncIterator[list[httpx.Response]]:
    """Short requests for a model go on inside; yields the growing list of answers."""
    answers: list[httpx.Response] = []

    async def ask() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            while True:
                body = {"model": model, "prompt": "a", "max_tokens": 1}
                answers.append(await http.post("/v1/completions", json=body))
                await asyncio.sleep(0.1)

    asking = asyncio.create_task(ask())
    yield answers
    asking.cancel()
    await asyncio.wait([asking])


async def until(condition: Any, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, f"{what} took longer than {timeout_s} s"
        await asyncio.sleep(0.5)


async def test_replicas_follow_the_load_up_and_down(sim_cluster: RunningCluster) -> None:
    with httpx.Client(base_url=sim_cluster.http_url, timeout=60) as http:
        assert num_replicas(http) == 1
        async with unbroken_load(sim_cluster.http_url, streams=16):
            await until(lambda: num_replicas(http) == 3, 120, "scaling up")
        # A few streams go on while replicas are taken out; none of them may break.
        async with unbroken_load(sim_cluster.http_url, streams=2):
            await until(lambda: num_replicas(http) == 1, 120, "scaling down")


async def test_a_replica_without_a_link_is_reached_over_the_handle(
    sim_cluster: RunningCluster,
) -> None:
    async with httpx.AsyncClient(base_url=f"{sim_cluster.http_url}/beside", timeout=60) as http:
        answers = await asyncio.gather(*(http.post("/v1/completions", json=BODY) for _ in range(4)))
        for answer in answers:
            assert answer.text.count('"text"') == 25
            assert answer.text.endswith("[DONE]\n\n")
        whole = await http.post("/v1/completions", json={**BODY, "stream": False})
        assert whole.json()["usage"]["completion_tokens"] == 25
        refused = await http.post("/v1/completions", json={**BODY, "max_tokens": -1})
        assert refused.status_code == 400
        metrics = (await http.get("/metrics")).text
        assert 'tandem_link_fallbacks_total{model="sim"} 6.0' in metrics
        assert 'tandem_replicas{model="sim",state="fallback"} 1.0' in metrics
        assert 'tandem_completion_tokens_total{model="sim"} 125.0' in metrics


async def test_an_update_leaves_no_gap(sim_cluster: RunningCluster, tmp_path: Path) -> None:
    """``serve deploy`` of a changed file replaces every replica while streams run.

    It adds an adapter, and no replica of before is asked for that: it would answer 404 itself.
    """
    port = int(sim_cluster.http_url.rsplit(":", 1)[1])
    changed = config(
        sim={"decode_s_per_token": 0.01}, replicas={"min": 1, "max": 1}, adapters={"law": "none"}
    )
    changed["http_options"]["port"] = port
    file = tmp_path / "changed.yaml"
    file.write_text(yaml.safe_dump(changed), encoding="utf-8")
    before = {replica["id"] for replica in replicas(sim_cluster)}
    serve = Path(sys.executable).with_name("serve")
    command = [serve, "deploy", "-a", sim_cluster.status()["state"]["dashboard_url"], str(file)]

    def replaced() -> bool:
        now = replicas(sim_cluster)
        ids = {replica["id"] for replica in now}
        return not before & ids and all(replica["state"] == "RUNNING" for replica in now)

    async with (
        unbroken_load(sim_cluster.http_url, streams=4),
        asked_all_along(sim_cluster.http_url, "law") as told,
    ):
        done = await asyncio.to_thread(
            subprocess.run,
            command,
            env=sim_cluster.env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        await until(replaced, 150, "the update")
        await until(lambda: told[-1].status_code == 200, 30, "the adapter")
    for answer in told:
        if answer.status_code == 404:
            assert "Known models: sim" in answer.text  # a router of before
        elif answer.status_code == 503:
            assert int(answer.headers["retry-after"]) > 0
        else:
            assert answer.status_code == 200


def replicas(cluster: RunningCluster) -> list[Any]:
    deployments = cluster.status()["application"]["deployments"]
    return [replica for deployment in deployments for replica in deployment["replicas"]]
