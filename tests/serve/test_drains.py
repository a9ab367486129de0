"""Routers and replicas that stop finish answers of up to ``max_answer_s``, and no longer ones."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.devices import DeviceWatch
from cluster.errors import (
    DeviceFailedError,
    EngineDeadError,
    ReplicaRetiredError,
    TandemError,
    UnavailableError,
)
from cluster.gateway.builtin.drain import REPLICA_DRAIN_PATH
from cluster.leaks import Growth
from cluster.link import LinkState, RequestHead
from cluster.metrics import Registry
from deployments import replica as replica_module
from deployments import serve_metrics, watching
from tests import asgi
from tests.serve.deployment_kit import (
    COMPLETION,
    POOL,
    TOKEN_S,
    Background,
    completion_body,
    make_config,
    open_completion,
    replace_ray,
    running_generator,
    running_router,
)
from tests.serve.link_kit import read_all, until
from tests.unit.test_devices import Gpu, Nvml

LONG_TOKENS = 3000
"""Tokens of a stream that takes longer than any of the tests."""
SHORT_TOKENS = 50
GROWTH = Growth(1e6, leaking=True)


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replace_ray(monkeypatch, tmp_path)


async def stop(replica: Any) -> None:
    await replica.stop()


async def retire(replica: Any) -> None:
    await replica.retire("a leak")
    with pytest.raises(ReplicaRetiredError):
        await replica.check_health()


ENDINGS: list[Callable[[Any], Awaitable[None]]] = [stop, retire]


@pytest.mark.parametrize("end", ENDINGS)
async def test_a_replica_finishes_answers_of_up_to_max_answer_s(
    end: Callable[[Any], Awaitable[None]],
) -> None:
    config = make_config(router={"max_answer_s": 30})
    async with running_generator(config) as (replica, link):
        stream = open_completion(link, SHORT_TOKENS)
        await stream.read()
        started_at = asyncio.get_running_loop().time()
        await end(replica)
        took_s = asyncio.get_running_loop().time() - started_at
        assert (await read_all(stream)).endswith(b"data: [DONE]\n\n")
        assert took_s < 15 + SHORT_TOKENS * TOKEN_S


async def test_a_stopping_replica_cuts_longer_answers() -> None:
    async with running_generator(make_config(router={"max_answer_s": 1})) as (replica, link):
        stream = open_completion(link, LONG_TOKENS)
        await stream.read()
        await replica.stop()
        with pytest.raises(UnavailableError, match="stopped before the response was complete"):
            await read_all(stream)


async def test_a_retired_replica_is_replaced_after_max_answer_s_in_any_case() -> None:
    async with running_generator(make_config(router={"max_answer_s": 1})) as (replica, link):
        stream = open_completion(link, LONG_TOKENS)
        await stream.read()
        await retire(replica)
        assert link.state is LinkState.DRAINING
        assert await stream.read()  # only Serve ends it
        stream.cancel()


async def test_a_replica_drains_at_the_request_of_a_router() -> None:
    async with running_generator(make_config()) as (replica, link):
        stream = open_completion(link, SHORT_TOKENS)
        await stream.read()
        asked = link.open(RequestHead(method="POST", path=REPLICA_DRAIN_PATH))
        assert (await asked.head()).status == 202
        await replica.check_health()
        await until(lambda: link.state is LinkState.DRAINING)
        assert (await read_all(stream)).endswith(b"data: [DONE]\n\n")
        with pytest.raises(ReplicaRetiredError, match="drained by an operator"):
            await asgi.check_health_repeatedly(replica)


async def until_queued(router: Any) -> None:
    await until(lambda: router.record_autoscaling_stats()[f"{POOL}/queued"] == 1)


async def test_a_router_finishes_answers_of_up_to_max_answer_s() -> None:
    config = make_config(router={"max_answer_s": 30, "queue_timeout_s": 1})
    async with running_router(config) as (router, link):
        queued = open_completion(link, SHORT_TOKENS)
        await until_queued(router)
        await router.stop()
        assert b"no replica became ready in time" in await read_all(queued)


async def test_a_router_cuts_longer_answers() -> None:
    config = make_config(router={"max_answer_s": 1, "queue_timeout_s": 30})
    async with running_router(config) as (router, link):
        queued = open_completion(link, SHORT_TOKENS)
        await until_queued(router)
        async with asyncio.timeout(25):
            await router.stop()
        with pytest.raises(UnavailableError, match="stopped before the response was complete"):
            await queued.head()


class Keys:
    """Key-value store of the leases, as in the GCS."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def put_if_absent(self, key: str, value: str) -> bool:
        return self.values.setdefault(key, value) == value

    def has(self, key: str) -> bool:
        return key in self.values


async def test_a_leaking_replica_keeps_its_lease_while_it_drains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys, now_s = Keys(), 0.0
    leaks: list[Callable[[str, Growth], None]] = []

    class Watch(watching.MemoryWatch):
        def __init__(
            self, config: Any, model: Any, in_flight: Any, on_leak: Any, *rest: Any
        ) -> None:
            leaks.append(on_leak)
            super().__init__(config, model, in_flight, on_leak, *rest)

    monkeypatch.setattr(watching, "MemoryWatch", Watch)
    monkeypatch.setattr(watching, "RayKeys", lambda: keys)
    monkeypatch.setattr(watching, "RENEWALS_PER_PERIOD", 1000)  # every 10 ms
    monkeypatch.setattr(watching.time, "time", lambda: now_s)
    config = make_config(leaks={"replace": True, "pause_s": 10})
    async with running_generator(config) as (replica, link):
        stream = open_completion(link, LONG_TOKENS)
        await stream.read()
        (on_leak,) = leaks
        on_leak("own", GROWTH)
        for period in range(4):
            now_s = 10.0 * period
            await until(lambda period=period: f"replaced/app/d/{period}" in keys.values)
        stream.cancel()
        with pytest.raises(ReplicaRetiredError, match="own memory grows"):
            await asgi.check_health_repeatedly(replica)


# -- failed GPUs ------------------------------------------------------------------------------


@pytest.mark.parametrize("engine_dies", [False, True])
@pytest.mark.parametrize("error", [None, RuntimeError("the GCS does not answer")])
async def test_the_node_of_a_faulty_gpu_drains_before_the_replica_ends(
    monkeypatch: pytest.MonkeyPatch, engine_dies: bool, error: Exception | None
) -> None:
    nvml, requested, answer = Nvml(Gpu("GPU-a")), asyncio.Event(), asyncio.Event()
    watches: list[DeviceWatch] = []

    async def drain(fault: str) -> bool:
        assert fault == "GPU GPU-a: XID 79"
        requested.set()
        await answer.wait()
        if error is not None:
            raise error
        return True

    def watch(config: Any, model: str, _workers: Any) -> DeviceWatch:
        watches.append(DeviceWatch(config.devices, model, nvml, ["0"], drain))
        return watches[0]

    monkeypatch.setattr(watching, "_devices", watch)
    monkeypatch.setattr(watching, "LAST_READING_S", 60)
    # With a dead engine, only the health check reads the device.
    interval_s = 3600 if engine_dies else 0.01
    devices = {"drain_node": True, "interval_s": interval_s}
    sim = {"die_after_requests": 1} if engine_dies else None
    async with running_generator(make_config(sim, devices=devices)) as (replica, link):
        await replica.check_health()
        nvml.events.append((nvml.gpus[0], 79))
        if engine_dies:
            with suppress(TandemError):
                await read_all(open_completion(link, 1))
        checks = asyncio.create_task(asgi.check_health_repeatedly(replica))
        async with asyncio.timeout(60):
            await requested.wait()
            await until(lambda: link.state is LinkState.DRAINING)
        assert not checks.done()
        answer.set()
        with pytest.raises(EngineDeadError if engine_dies else DeviceFailedError):
            await checks


async def test_a_slow_gpu_delays_health_checks_only_so_long_and_its_fault_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvml, answers, requested = Nvml(Gpu("GPU-a")), threading.Event(), asyncio.Event()

    async def drain(_fault: str) -> bool:
        requested.set()
        return True

    def watch(config: Any, model: str, _workers: Any) -> DeviceWatch:
        return DeviceWatch(config.devices, model, nvml, ["0"], drain)

    def power(_gpu: Gpu) -> int:
        assert answers.wait(60)
        return 1

    monkeypatch.setattr(nvml, "nvmlDeviceGetPowerUsage", power)
    monkeypatch.setattr(watching, "_devices", watch)
    monkeypatch.setattr(watching, "LAST_READING_S", 0.01)
    devices = {"drain_node": True, "interval_s": 3600}
    config = make_config({"die_after_requests": 1}, devices=devices)
    async with running_generator(config) as (replica, link):
        nvml.events.append((nvml.gpus[0], 79))
        with suppress(TandemError):
            await read_all(open_completion(link, 1))
        for _ in range(2):
            with pytest.raises(EngineDeadError):
                await replica.check_health()
        assert not requested.is_set()
        answers.set()
        async with asyncio.timeout(60):
            await requested.wait()


# -- requests over the handle -----------------------------------------------------------------


async def test_requests_over_the_handle_end_when_the_engine_hangs() -> None:
    config = make_config({"hang_after_requests": 1}, stall_timeout_s=1)
    async with running_generator(config) as (replica, _):
        items = replica.answer_call("r1", COMPLETION, completion_body(3))
        assert [item async for item in items]
        items = replica.answer_call("r1", COMPLETION, completion_body(3))
        hung = asyncio.ensure_future(anext(items))
        with pytest.raises(EngineDeadError, match="no progress"):
            await asgi.check_health_repeatedly(replica)
        async with asyncio.timeout(60):
            with pytest.raises(EngineDeadError, match="try again"):
                await hung


# -- Serve's metrics of requests --------------------------------------------------------------


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> list[Registry]:
    """Return the registries that replicas export."""
    exported: list[Registry] = []

    class Exporter(Background):
        def __init__(self, registry: Registry) -> None:
            exported.append(registry)

    monkeypatch.setattr(replica_module, "RayExporter", Exporter)
    return exported


async def test_serves_metrics_count_requests_over_links_and_not_those_over_the_handle(
    registries: list[Registry],
) -> None:
    async with running_generator(make_config()) as (replica, link):
        (registry,) = registries
        items = replica.answer_call("r1", COMPLETION, completion_body(3))
        assert [item async for item in items]
        assert not registry.series(serve_metrics.REQUESTS)  # Serve has counted it
        stream = open_completion(link, 3)
        assert (await read_all(stream)).endswith(b"data: [DONE]\n\n")
        await until(lambda: registry.series(serve_metrics.REQUESTS))
        (counter,) = registry.series(serve_metrics.REQUESTS).values()
        assert counter.value == 1


async def test_serves_metrics_do_not_count_drains(registries: list[Registry]) -> None:
    async with running_generator(make_config()) as (replica, link):
        (registry,) = registries
        stream = open_completion(link, SHORT_TOKENS)
        await stream.read()
        asked = link.open(RequestHead(method="POST", path=REPLICA_DRAIN_PATH))
        assert (await asked.head()).status == 202
        assert (await read_all(stream)).endswith(b"data: [DONE]\n\n")
        with pytest.raises(ReplicaRetiredError, match="drained by an operator"):
            await asgi.check_health_repeatedly(replica)
        await until(lambda: registry.series(serve_metrics.REQUESTS))
        assert list(registry.series(serve_metrics.REQUESTS)) == [(COMPLETION.path,)]
