"""Scaling, link fallback and rolling update with several routers and simulated replicas."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import psutil
import pytest

from tests.cluster.conftest import RunningCluster, router_config, serve_config, sim_generator
from tests.cluster.streams import BODY, complete_streams, is_complete, until

LONG_TOKENS = 600
"""Tokens of a stream that takes 12 s."""
ENVIRONMENT = {"RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3"}
"""Without ``router.max_answer_s``, a replaced HAProxy would cut longer streams."""


def config(seed: int = 0, update: int = 0, **generator: Any) -> dict[str, Any]:
    """Return a configuration.

    Another ``seed`` or ``update`` replaces the routers and the replicas of ``sim``. With another
    ``seed``, new replicas cannot continue the answers of old ones.
    """
    fields = {
        "resources": {"cpus": 0.1 + update / 100},
        "sim": {"decode_s_per_token": 0.02, "seed": seed},
        "max_model_len": 32_768,
        "max_in_flight": 16,
        "replicas": {"min": 1, "max": 1},
    }
    sim = sim_generator(**{**fields, **generator})
    unlinkable = {
        "name": "unlinkable",
        "route_prefix": "/unlinkable",
        "import_path": "tests.cluster.unlinkable:build",
        "args": {
            "generators": [sim_generator(sim={"decode_s_per_token": 0.02})],
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
    resources = {"cpus": 0.1 + (seed + update) / 100}
    router = router_config(2, max_queued=1000, open=True, resources=resources)
    steady = sim_generator(
        name="steady",
        sim={"decode_s_per_token": 0.02},
        replicas={"min": 2, "max": 2},
        routing="round-robin",
    )
    elastic = sim_generator(
        name="elastic",
        sim={"decode_s_per_token": 0.04, "batch_slowdown": 0.05},
        max_in_flight=32,
        slo={"ttft_p90_s": 2.0, "itl_p90_s": 0.07},
        replicas={
            "min": 0,
            "max": 24,
            "target_in_flight": 8,
            "upscale_delay_s": 0,
            "downscale_delay_s": 5,
        },
        resources={"cpus": 0.01},
    )
    whole = serve_config(unlinkable, keyless, generators=[sim, steady, elastic], router=router)
    whole["http_options"]["host"] = "0.0.0.0"
    return whole


def generators_of(cluster: RunningCluster) -> set[str]:
    """Return the ids of the replicas of the pool ``sim``."""
    return {id for id, (name, _) in cluster.replicas().items() if name == "generator-sim"}


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


@pytest.mark.timeout(900)
@pytest.mark.parametrize("growth", [4, pytest.param(8, marks=pytest.mark.long)])
async def test_replicas_follow_the_load_and_no_request_fails(
    sim_cluster: RunningCluster, growth: int
) -> None:
    url, few = sim_cluster.http_url, 24

    def replicas() -> int:
        return int(httpx.get(f"{url}/ready", timeout=60).json()["pools"]["elastic"]["replicas"])

    async with (
        complete_streams(url, streams=1, tokens=250, model="elastic"),  # goes on in drains
        complete_streams(url, streams=few, tokens=50, model="elastic") as load,
    ):  # queued until the first replica has started
        # The ITL SLO allows 16 streams per replica: 0.04 s * (1 + 0.05 * 15) = 0.07 s. A busy
        # machine, where steps take longer, needs more.
        await until(lambda: replicas() >= few // 16 + 1, 240, "starting replicas")
        await load.resize(growth * few)
        await until(lambda: replicas() >= growth * few // 16, 300, "scaling up")
        await load.resize(few)
        await until(lambda: replicas() <= 8, 300, "scaling down")
    await until(lambda: not replicas(), 120, "scaling down to zero")


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
    expected = (
        'tandem_link_fallbacks_total{model="sim"} 6.0',
        'tandem_replicas{model="sim",state="fallback"} 1.0',
        'tandem_completion_tokens_total{model="sim"} 125.0',
    )

    def are_counted() -> bool:  # which the router may do after the client has the answer
        metrics = httpx.get(f"{sim_cluster.http_url}/unlinkable/metrics", timeout=60).text
        return all(line in metrics for line in expected)

    await until(are_counted, 60, "counting the requests")


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
    slow = sim_cluster.deployments()["generator-steady"][0]
    slow_id = slow["replica_id"]
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
        tasks = [asyncio.create_task(ask(http)) for _ in range(8)]
        try:
            # The routers learn the usual speed.
            await until(lambda: ends.total() >= 100, 120, "answers of both replicas")
            slowing = asyncio.create_task(SlowProcess(slow["pid"]).run())
            tasks.append(slowing)
            await until(lambda: circuits()[slow_id] == "open", 120, "taking it out")
            await until(
                # For a moment after a successful probe, the circuit is closed.
                lambda: (
                    (sim_cluster.status()["conditions"] or {}).get(slow_id)
                    in ("circuit open", "circuit half-open")
                ),
                60,
                "the condition in the status",
            )
            slowing.cancel()
            await until(lambda: set(circuits().values()) == {"closed"}, 120, "restoring it")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
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
    """``serve deploy`` twice replaces every replica of ``sim`` and router while streams run.

    The first update adds a replica and an adapter. Requests for it must not reach old replicas,
    which reject them. The second one removes a replica. Streams take longer than each update, so
    some old replicas still finish theirs after the second one.
    """

    def update(num: int) -> Callable[[], bool]:
        before = {
            id
            for id, (name, _) in sim_cluster.replicas().items()
            if name in ("router", "generator-sim")
        }
        replicas = {"min": num, "max": num}
        sim_cluster.deploy(config(seed=num, replicas=replicas, adapters={"law": "none"}))

        def is_complete() -> bool:
            now = sim_cluster.replicas()
            running = [name for id, (name, state) in now.items() if state == "RUNNING"]
            return running.count("generator-sim") == num and not any(
                now[id][1] == "RUNNING" for id in before & now.keys()
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
        await until(lambda: adapter_responses[-1].status_code == 200, 120, "the adapter")
    for answer in adapter_responses:
        if answer.status_code == 404:
            # From a router before the update.
            assert "Known models: elastic, sim, steady" in answer.text
        elif answer.status_code == 503:
            assert int(answer.headers["retry-after"]) > 0
        else:
            assert answer.status_code == 200


UPDATED = config(seed=1, update=2, replicas={"min": 1, "max": 1}, adapters={"law": "none"})
"""Update of the last configuration of the test above."""


async def test_an_update_takes_seconds_although_streams_take_minutes(
    sim_cluster: RunningCluster,
) -> None:
    body = {**BODY, "max_tokens": 30_000}  # 10 minutes
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
            await asyncio.to_thread(sim_cluster.deploy, UPDATED)
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
        done = sim_cluster.tandem("adapters", "list", "--json")
        # The command fails while the last test's routers are being replaced.
        rows = json.loads(done.stdout) if done.returncode == 0 else []
        return {row["name"]: row["replicas"] for row in rows}

    def tandem(*args: str) -> str:
        done = sim_cluster.tandem("adapters", *args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    both = config(
        seed=1, update=2, replicas={"min": 2, "max": 2}, adapters={"law": "none", "art": "none"}
    )
    sim_cluster.deploy(UPDATED)  # unchanged after the last test
    await until(lambda: adapters() == {"law": 1}, 120, "the update")
    await until(lambda: len(generators_of(sim_cluster)) == 1, 120, "the end of the old replicas")
    await until(sim_cluster.all_run, 120, "the update of the other pools")
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
        # A replica that applies a change is not RUNNING for a moment.
        await until(lambda: sim_cluster.replicas() == before, 60, "listing the same replicas")
        await asyncio.to_thread(sim_cluster.deploy, both)
        await until(lambda: adapters() == {"law": 2, "art": 2}, 120, "the second replica")
        await asyncio.to_thread(tandem, "remove", "art")
        assert before.keys() <= (await asyncio.to_thread(sim_cluster.replicas)).keys()
        await until(lambda: adapters() == {"law": 2}, 120, "the removal")
    assert {answer.status_code for answer in answers} == {200}
