"""A replica's watches: memory of real processes, devices, accounting, periodic actions."""

import asyncio
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.accounting import IDLE
from cluster.accounting.meter import find_meter
from cluster.accounting.replica import ReplicaAccounting
from cluster.config import GeneratorConfig, parse
from cluster.config.operations import AccountingConfig, DevicesConfig, LeaksConfig
from cluster.devices import DeviceWatch
from cluster.engines.base import EngineWorker
from cluster.engines.sim import SimEngine
from cluster.errors import DeviceFailedError
from cluster.leaks import Growth, MemoryWatch
from cluster.leaks.watch import OWN, STARTED, resident_memory
from cluster.metrics import Registry, exposition
from cluster.periodic import Periodic
from cluster.ray_internals import RayNode
from deployments import watching
from tests import asgi
from tests.unit.test_devices import Gpu, Nvml

MIB = 1024**2
COMPLETIONS = "/v1/completions"


async def test_a_periodic_action_continues_after_failures(caplog: pytest.LogCaptureFixture) -> None:
    done = asyncio.Event()
    calls = 0

    async def action() -> None:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise RuntimeError("not yet")
        done.set()

    periodic = Periodic("the test's", 0.001, action)
    await asyncio.wait_for(done.wait(), 60)
    await periodic.close()
    assert [record.message for record in caplog.records].count("the test's failed; retrying") == 1


def test_memory_of_this_process_and_its_children_is_measured() -> None:
    code = "import sys; held = b'1' * (64 << 20); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdout.readline()
        memory = resident_memory()
        child.stdin.close()
    assert memory[STARTED] > 64 * MIB
    assert memory[OWN] > 10 * MIB


async def test_a_leaking_simulated_engine_is_reported() -> None:
    config = LeaksConfig(
        sample_s=0.05,
        window_s=1.0,
        settle_s=0,
        min_bytes_per_s=4 * MIB,
        min_growth_bytes=8 * MIB,  # type: ignore[arg-type]
    )
    sim = {"leak_bytes_per_request": 2 * MIB}
    engine = SimEngine(
        GeneratorConfig.model_validate({"name": "g", "model": "m", "engine": "sim", "sim": sim})
    )
    await engine.start()
    leaks: asyncio.Queue[tuple[str, Growth]] = asyncio.Queue()
    watch = MemoryWatch(config, "g", lambda: 1, lambda *leak: leaks.put_nowait(leak))
    try:
        async with asyncio.timeout(60):
            while leaks.empty():
                body = {"model": "g", "prompt": "a", "max_tokens": 1}
                assert (await asgi.post(engine.app, COMPLETIONS, body)).status == 200
                await asyncio.sleep(0.02)
        process, growth = leaks.get_nowait()
        assert process == OWN
        assert growth.bytes_per_s > 4 * MIB
        registry = Registry()
        watch.observe(registry)
        text = exposition(registry).decode()
        assert 'tandem_process_resident_memory_bytes{model="g",process="own"}' in text
        assert 'tandem_memory_growth_bytes_per_second{model="g",process="own"}' in text
    finally:
        await watch.close()
        await engine.stop()


async def test_growth_of_an_engine_within_what_it_takes_on_demand_is_not_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = (number * 128 * MIB for number in itertools.count(8))
    monkeypatch.setattr(
        "cluster.leaks.watch.resident_memory", lambda _: dict.fromkeys((OWN, STARTED), next(sizes))
    )
    config = LeaksConfig(sample_s=0.01, window_s=0.1, settle_s=0, min_bytes_per_s=1)
    leaks: asyncio.Queue[str] = asyncio.Queue()
    watch = MemoryWatch(
        config, "g", lambda: 1, lambda process, _: leaks.put_nowait(process), (), 1024**4
    )
    try:
        async with asyncio.timeout(60):
            assert [await leaks.get() for _ in range(3)] == [OWN] * 3
    finally:
        await watch.close()


async def check_repeatedly(watch: DeviceWatch) -> None:
    while True:
        watch.check()
        await asyncio.sleep(0.01)


async def no_drain(_fault: str) -> bool:
    raise AssertionError


async def test_a_device_failure_is_noticed_in_the_background() -> None:
    nvml = Nvml(Gpu("GPU-a"))
    watch = DeviceWatch(DevicesConfig(interval_s=0.01), "g", nvml, ["0"], no_drain)
    try:
        await watch.read()
        watch.check()
        assert watch.joules is not None
        assert watch.joules() == 5.0
        nvml.events.append((nvml.gpus[0], 79))
        async with asyncio.timeout(60):
            with pytest.raises(DeviceFailedError, match="XID 79"):
                await check_repeatedly(watch)
    finally:
        await watch.close()
    assert nvml.freed


async def test_a_node_is_asked_to_drain_until_that_is_settled() -> None:
    nvml = Nvml(Gpu("GPU-a"))
    requests: asyncio.Queue[str] = asyncio.Queue()
    answers: asyncio.Queue[Exception | bool] = asyncio.Queue()

    async def drain(fault: str) -> bool:
        requests.put_nowait(fault)
        answer = await answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    config = DevicesConfig(interval_s=0.01, drain_node=True)
    watch = DeviceWatch(config, "g", nvml, ["0"], drain)
    try:
        nvml.events.append((nvml.gpus[0], 79))
        for answer in (RuntimeError("the GCS does not answer"), False, True):
            async with asyncio.timeout(60):
                assert await requests.get() == "GPU GPU-a: XID 79"
            with pytest.raises(DeviceFailedError, match="XID 79"):
                watch.check()
            answers.put_nowait(answer)
        await watch.read()
        assert requests.empty()
    finally:
        await watch.close()


async def test_an_idle_replica_without_counters_is_charged_its_price(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cluster.accounting.counters.POWERCAP", tmp_path / "none")
    meter = find_meter(AccountingConfig(), None, gpus_reserved=False)
    accounts = ReplicaAccounting("g", meter, price_per_s=2.0, interval_s=3600)
    try:
        await accounts.divide()
        registry = Registry()
        accounts.observe(registry)
        assert f'tandem_cost_total{{model="g",tenant="{IDLE}"}}' in exposition(registry).decode()
        assert meter.source == "no-counter"
    finally:
        await accounts.close()


async def test_accounting_without_meter_and_price_starts_no_task(tmp_path: Path) -> None:
    meter = find_meter(AccountingConfig(energy=False), None, gpus_reserved=False)
    before = asyncio.all_tasks()
    accounts = ReplicaAccounting("g", meter, price_per_s=0.0, interval_s=3600)
    assert asyncio.all_tasks() == before
    assert accounts.open_request({"headers": [], "extensions": {}}) is None
    await accounts.close()


@pytest.mark.parametrize("is_head", [False, True])
async def test_devices_of_workers_in_other_actors_belong_to_the_replica(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_head: bool
) -> None:
    nvml = Nvml(Gpu("GPU-a"), Gpu("GPU-b"), Gpu("GPU-c"))
    deployment = SimpleNamespace(app_name="tandem", name="generator-g")
    replica = SimpleNamespace(unique_id="r", deployment_id=deployment)
    context = SimpleNamespace(replica_id=replica)
    runtime = SimpleNamespace(
        get_accelerator_ids=lambda: {"GPU": []}, get_node_id=lambda: "this-node"
    )
    nodes = [RayNode("other", "10.0.0.1", not is_head), RayNode("this-node", "10.0.0.2", is_head)]
    drained: list[tuple[str, str]] = []
    refusals = ["it is busy", ""]

    def drain_node(node_id: str, message: str, _timeout_s: float) -> str:
        drained.append((node_id, message))
        return refusals.pop(0)

    monkeypatch.setattr(watching, "live_nodes", lambda _timeout_s: nodes)
    monkeypatch.setattr(watching, "drain_node", drain_node)
    monkeypatch.setattr(watching.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(watching.ray, "get_runtime_context", lambda: runtime)
    monkeypatch.setattr(watching, "load_nvml", lambda: nvml)
    pool = {"name": "g", "model": "m", "tensor_parallel_size": 2, "resources": {"gpus": 1}}
    devices_config = {"interval_s": 3600, "drain_node": True}
    config = parse({"generators": [pool], "devices": devices_config})

    async def retire(_reason: str) -> None:
        raise AssertionError

    workers = [EngineWorker(os.getpid(), "GPU-a"), EngineWorker(os.getpid(), "GPU-c")]
    watch = watching.ReplicaWatch(
        config.operations, config.generators[0], lambda: 0, retire, workers
    )
    try:
        nvml.events.append((nvml.gpus[2], 79))
        for _ in range(3):
            await watch.read_devices()
            with pytest.raises(DeviceFailedError, match="GPU GPU-c: XID 79"):
                watch.check()
        assert drained == ([] if is_head else [("this-node", "GPU GPU-c: XID 79")] * 2)
        reason = "it is the head" if is_head else "it is busy"
        assert caplog.text.count(f"node this-node is not drained: {reason}") == 1
        registry = Registry()
        watch.observe(registry)
        text = exposition(registry).decode()
        devices = {"GPU-a", "GPU-c"}
        assert {device for device in (*devices, "GPU-b") if f'device="{device}"' in text} == devices
    finally:
        await watch.close()
