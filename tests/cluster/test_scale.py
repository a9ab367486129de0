"""Scaling, link fallback and rolling update with several routers and simulated replicas."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import psutil

from tests.cluster.conftest import RunningCluster, router_config, serve_config, sim_generator

BODY = {"model": "sim", "prompt": "a b c", "max_tokens": 25, "stream": True}
LONG_TOKENS = 600
"""Tokens of a stream that takes 12 s."""
ENVIRONMENT = {"RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3"}
"""Without ``router.max_answer_s``, a replaced HAProxy would cut longer streams."""


def config(seed: int = 0, **generator: Any) -> dict[str, Any]:
    """Return a configuration; with another ``seed``, it replaces all replicas and routers."""
    scaled = {
        "min": 1,
        "max": 3,
        "target_in_flight": 4,
        "upscale_delay_s": 0,
        "downscale_delay_s": 1,
    }
    fields = {
        "sim": {"decode_s_per_token": 0.02, "seed": seed},
        "max_in_flight": 16,
        "replicas": scaled,
    }
    sim = sim_generator(**{**fields, **generator})
    unlinkable = {
        "name": "unlinkable",
        "route_prefix": "/unlinkable",
        "import_path": "tests.cluster.unlinkable:build",
        "args": {
            "generators": [{**sim, "replicas": {"min": 1, "max": 1}}],
            "router": router_config(1, open=True),
        },
    }
    # Deployed past the checks of `tandem`, like an application of `serve deploy` or KubeRay.
    keyless = {
        **unlinkable,
        "name": "keyless",
        "route_prefix": "/keyless",
        "import_path": "deployments.app.build",  # not what `tandem` looks for
        "args": {**unlinkable["args"], "router": router_config(1)},
    }
    resources = {"cpus": 0.1 + seed / 100}
    router = router_config(2, max_queued=200, open=True, resources=resources)
    steady = sim_generator(
        name="steady",
        sim={"decode_s_per_token": 0.02, "seed": seed},
        replicas={"min": 2, "max": 2},
        routing="round-robin",
    )
    whole = serve_config(unlinkable, keyless, generators=[sim, steady], router=router)
    whole["http_options"]["host"] = "0.0.0.0"
    return whole


def num_replicas(http: httpx.Client) -> int:
    return int(http.get("/ready").json()["pools"]["sim"]["replicas"])


def generators_of(cluster: RunningCluster) -> set[str]:
    """Return the ids of the replicas of the pool ``sim``."""
    return {id for id, (name, _) in cluster.replicas().items() if name == "generator-sim"}


def is_complete(stream: str, tokens: int = 25) -> bool:
    return stream.count('"text"') == tokens and stream.endswith("[DONE]\n\n")


class StreamClients:
    """Concurrent streams, repeated until ``stop`` is set, and counts of how they ended."""

    def __init__(self, url: str, streams: int, tokens: int) -> None:
        self._url = url
        self._streams = streams
        self._tokens = tokens
        self.ends: Counter[str] = Counter()
        self.stop = asyncio.Event()

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=self._streams)
        async with httpx.AsyncClient(base_url=self._url, limits=limits, timeout=120) as http:
            await asyncio.gather(*(self._repeat(http) for _ in range(self._streams)))

    async def _repeat(self, http: httpx.AsyncClient) -> None:
        while not self.stop.is_set():
            body = {**BODY, "max_tokens": self._tokens}
            response = await http.post("/v1/completions", json=body)
            complete = is_complete(response.text, self._tokens)
            end = "complete" if complete else f"{response.status_code}: {response.text[-200:]}"
            self.ends[end] += 1


@asynccontextmanager
async def complete_streams(url: str, streams: int, tokens: int = 25) -> AsyncIterator[None]:
    """Run concurrent streams inside the block; every stream must be complete."""
    clients = StreamClients(url, streams, tokens)
    running = asyncio.create_task(clients.run())
    try:
        yield
    finally:
        clients.stop.set()
        await running
    assert set(clients.ends) == {"complete"}, clients.ends


@asynccontextmanager
async def periodic_requests(url: str, model: str) -> AsyncIterator[list[httpx.Response]]:
    """Send short requests to a model inside the block; yield the growing list of responses."""
    responses: list[httpx.Response] = []

    async def send() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            while True:
                body = {"model": model, "prompt": "a", "max_tokens": 1}
                responses.append(await http.post("/v1/completions", json=body))
                await asyncio.sleep(0.1)

    sending = asyncio.create_task(send())
    try:
        yield responses
    finally:
        sending.cancel()
        await asyncio.wait([sending])


async def until(condition: Any, timeout_s: float, event: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, f"{event} took longer than {timeout_s} s"
        await asyncio.sleep(0.5)


async def test_replicas_follow_the_load_up_and_down(sim_cluster: RunningCluster) -> None:
    with httpx.Client(base_url=sim_cluster.http_url, timeout=60) as http:
        assert num_replicas(http) == 1
        async with complete_streams(sim_cluster.http_url, streams=16):
            await until(lambda: num_replicas(http) == 3, 120, "scaling up")
        # Some streams continue while replicas are drained; all must be complete.
        async with (
            complete_streams(sim_cluster.http_url, streams=1),
            complete_streams(sim_cluster.http_url, streams=1, tokens=LONG_TOKENS),
        ):
            await until(lambda: num_replicas(http) == 1, 120, "scaling down")


async def test_a_replica_without_a_link_is_called_through_its_handle(
    sim_cluster: RunningCluster,
) -> None:
    async with httpx.AsyncClient(base_url=f"{sim_cluster.http_url}/unlinkable", timeout=60) as http:
        responses = await asyncio.gather(
            *(http.post("/v1/completions", json=BODY) for _ in range(4))
        )
        assert all(is_complete(response.text) for response in responses)
        unary = await http.post("/v1/completions", json={**BODY, "stream": False})
        assert unary.json()["usage"]["completion_tokens"] == 25
        rejected = await http.post("/v1/completions", json={**BODY, "max_tokens": -1})
        assert rejected.status_code == 400
        # Four streams, one unary request and one rejected one; five times 25 tokens.
        metrics = (await http.get("/metrics")).text
        assert 'tandem_link_fallbacks_total{model="sim"} 6.0' in metrics
        assert 'tandem_replicas{model="sim",state="fallback"} 1.0' in metrics
        assert 'tandem_completion_tokens_total{model="sim"} 125.0' in metrics


class SlowProcess:
    """A process that runs for a twentieth of the time; its links notice no silence."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)

    async def run(self) -> None:
        try:
            while True:
                self._process.suspend()
                await asyncio.sleep(0.95)
                self._process.resume()
                await asyncio.sleep(0.05)
        finally:
            self._process.resume()


async def test_a_slow_replica_is_taken_out_and_restored(sim_cluster: RunningCluster) -> None:
    deployments = sim_cluster.status()["application"]["deployments"]
    (steady,) = (each for each in deployments if each["name"].endswith("steady"))
    slow = steady["replicas"][0]
    ends: Counter[int] = Counter()
    url = sim_cluster.http_url

    def circuits() -> dict[str, str]:
        """Return the circuit of each replica, the worst one of all routers."""
        pool = httpx.get(f"{url}/dashboard/data?since=9999999999", timeout=60).json()["pools"]
        return {replica["id"]: replica["circuit"] for replica in pool["steady"]["replicas"]}

    async def ask(http: httpx.AsyncClient) -> None:
        while True:
            body = {**BODY, "model": "steady", "max_tokens": 10}
            ends[(await http.post("/v1/completions", json=body)).status_code] += 1

    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        asking = [asyncio.create_task(ask(http)) for _ in range(8)]
        await asyncio.sleep(3.0)  # the routers learn the usual speed
        slowing = asyncio.create_task(SlowProcess(slow["pid"]).run())
        await until(lambda: circuits()[slow["id"]] == "open", 90, "taking it out")
        conditions = (await asyncio.to_thread(sim_cluster.status))["conditions"]
        assert conditions[slow["id"]] in ("circuit open", "circuit half-open")
        slowing.cancel()
        await until(lambda: set(circuits().values()) == {"closed"}, 120, "restoring it")
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    assert set(ends) == {200}


async def test_a_router_without_keys_rejects_all_requests_on_an_exposed_address(
    sim_cluster: RunningCluster,
) -> None:
    body = {**BODY, "stream": False}
    async with httpx.AsyncClient(base_url=sim_cluster.http_url, timeout=60) as http:
        for path in ("/v1/models", "/metrics", "/dashboard/data"):
            assert (await http.get(f"/keyless{path}")).status_code == 401, path
        rejected = await http.post("/keyless/v1/completions", json=body)
        assert (await http.get("/keyless/health")).status_code == 200
        assert (await http.post("/v1/completions", json=body)).status_code == 200  # router.open
    assert rejected.status_code == 401
    assert "no API keys are configured" in rejected.json()["error"]["message"]


async def test_updates_of_replicas_and_routers_interrupt_no_stream(
    sim_cluster: RunningCluster,
) -> None:
    """``serve deploy`` twice replaces every replica and router while streams run.

    The first update adds a replica and an adapter. Requests for it must not reach old replicas,
    which reject them. The second one removes a replica. Streams take longer than each update, so
    some old replicas still finish theirs after the second one.
    """

    def update(num: int) -> Callable[[], bool]:
        before = sim_cluster.replicas()
        replicas = {"min": num, "max": num}
        sim_cluster.deploy(config(seed=num, replicas=replicas, adapters={"law": "none"}))

        def is_complete() -> bool:
            now = sim_cluster.replicas()
            running = [name for id, (name, state) in now.items() if state == "RUNNING"]
            return running.count("generator-sim") == num and not any(
                now[id][1] == "RUNNING" for id in before.keys() & now.keys()
            )

        return is_complete

    async with (
        complete_streams(sim_cluster.http_url, streams=4),
        complete_streams(sim_cluster.http_url, streams=4, tokens=LONG_TOKENS),
        periodic_requests(sim_cluster.http_url, "law") as adapter_responses,
    ):
        for num in (2, 1):
            is_complete = await asyncio.to_thread(update, num)
            await until(is_complete, 150, "the update")
        await until(lambda: adapter_responses[-1].status_code == 200, 30, "the adapter")
    for answer in adapter_responses:
        if answer.status_code == 404:
            assert "Known models: sim" in answer.text  # from a router before the update
        elif answer.status_code == 503:
            assert int(answer.headers["retry-after"]) > 0
        else:
            assert answer.status_code == 200


async def test_an_update_takes_seconds_although_streams_take_minutes(
    sim_cluster: RunningCluster,
) -> None:
    body = {**BODY, "max_tokens": 8000}  # 160 s
    received = bytearray()

    async def read(http: httpx.AsyncClient) -> None:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            async for piece in response.aiter_bytes():
                received.extend(piece)

    async with httpx.AsyncClient(base_url=sim_cluster.http_url, timeout=60) as http:
        reading = asyncio.create_task(read(http))
        try:
            await until(lambda: received, 60, "the start of the stream")
            before = generators_of(sim_cluster)
            updated = config(replicas={"min": 1, "max": 1}, adapters={"law": "none"}, seed=3)
            await asyncio.to_thread(sim_cluster.deploy, updated)
            await until(
                lambda: not before & generators_of(sim_cluster), 140, "the end of the old replicas"
            )
            num_received = len(received)
            await until(lambda: len(received) > num_received + 1000, 60, "the next tokens")
            assert b"error" not in received
            assert not reading.done()
        finally:
            reading.cancel()
            await asyncio.wait([reading])


async def test_adapters_are_added_to_running_and_to_new_replicas(
    sim_cluster: RunningCluster,
) -> None:
    def adapters() -> dict[str, int]:
        rows = json.loads(sim_cluster.tandem("adapters", "list", "--json").stdout)
        return {row["name"]: row["replicas"] for row in rows}

    def tandem(*args: str) -> str:
        done = sim_cluster.tandem("adapters", *args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    law, both = {"law": "none"}, {"law": "none", "art": "none"}
    one, two = ({"min": num, "max": num} for num in (1, 2))
    sim_cluster.deploy(config(seed=4, replicas=one, adapters=law))
    await until(lambda: adapters() == {"law": 1}, 90, "the update")
    await until(lambda: len(generators_of(sim_cluster)) == 1, 60, "the end of the old replicas")
    await until(
        lambda: {state for _, state in sim_cluster.replicas().values()} == {"RUNNING"},
        90,
        "the update of the other pools",
    )
    before = sim_cluster.replicas()
    async with (
        httpx.AsyncClient(base_url=sim_cluster.http_url, timeout=60) as http,
        complete_streams(sim_cluster.http_url, streams=4),
        periodic_requests(sim_cluster.http_url, "law") as answers,
    ):
        await asyncio.to_thread(tandem, "add", "art", "none", "--model", "sim")
        assert (
            await http.post("/v1/completions", json={**BODY, "model": "art"})
        ).status_code == 200
        assert sim_cluster.replicas() == before
        sim_cluster.deploy(config(seed=4, replicas=two, adapters=both))
        await until(lambda: adapters() == {"law": 2, "art": 2}, 90, "the second replica")
        await asyncio.to_thread(tandem, "remove", "art")
        # Serve lists no deployments while it builds an application.
        await until(lambda: before.keys() <= sim_cluster.replicas().keys(), 30, "the replicas")
        await until(lambda: adapters() == {"law": 2}, 30, "the removal")
    assert {answer.status_code for answer in answers} == {200}
