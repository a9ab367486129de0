"""vLLM's processes: two workers generate the same text as one, and all end with the replica."""

import asyncio
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
import pytest_asyncio

from cluster.config import GeneratorConfig
from cluster.engines.base import Engine
from cluster.engines.factory import make_generator_engine
from cluster.errors import EngineDeadError
from cluster.models import store
from tests import asgi
from tests.cluster.conftest import ROOT, wait_until
from tests.cluster.engine_processes import without_trackers
from tests.cluster.tiny_llama import make_tiny_llama

pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("default")]

BODY = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
REPLICA = """
    import asyncio, json, sys
    import psutil
    from cluster.config import GeneratorConfig
    from cluster.engines.factory import make_generator_engine
    from tests import asgi

    async def main():
        config, body = map(json.loads, sys.argv[1:])
        engine = make_generator_engine(GeneratorConfig.model_validate(config))
        await engine.start()
        answer = (await asgi.post(engine.app, "/v1/completions", body)).json()
        children = psutil.Process().children(recursive=True)
        found = {"text": answer["choices"][0]["text"], "pids": [child.pid for child in children]}
        print("STARTED", json.dumps(found), flush=True)
        await asyncio.sleep(600)

    if __name__ == "__main__":
        asyncio.run(main())
"""


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Write a model and return the configuration of its engine."""
    directory = tmp_path_factory.mktemp("tiny")
    make_tiny_llama(directory, store.resolve("smollm2-135m-instruct"))
    model = {"name": "m", "model": str(directory), "max_model_len": 512, "dtype": "float32"}
    return {**model, "kv_cache_memory_bytes": 2**27}


def make_engine(fields: dict[str, Any]) -> Engine:
    return make_generator_engine(GeneratorConfig.model_validate(fields))


def children() -> list[psutil.Process]:
    return list(without_trackers(psutil.Process().children(recursive=True)))


@pytest.fixture(scope="module")
def killed_replica(fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the text of an engine with two workers, and its processes; its replica is killed."""
    script = tmp_path_factory.mktemp("replica") / "replica.py"
    script.write_text(textwrap.dedent(REPLICA))
    config = json.dumps({**fields, "tensor_parallel_size": 2})
    command = [sys.executable, script, config, json.dumps(BODY)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as replica:
        assert replica.stdout is not None
        lines = iter(replica.stdout.readline, "")
        announced = next((line for line in lines if line.startswith("STARTED ")), "")
        replica.kill()
    return json.loads(announced.removeprefix("STARTED "))


def test_no_process_outlives_a_killed_replica(killed_replica: Any) -> None:
    pids = killed_replica["pids"]
    assert len(pids) >= 3  # the engine's process and two workers
    wait_until(lambda: not any(map(is_alive, pids)), 60, "the end of the processes")


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_a_cancelled_start_leaves_no_process(fields: dict[str, Any]) -> None:
    starting = asyncio.create_task(make_engine(fields).start())
    await asyncio.sleep(1.0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert children() == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(fields: dict[str, Any]) -> AsyncIterator[Engine]:
    started = make_engine({**fields, "stall_timeout_s": 2.0})
    await started.start()
    yield started
    await started.stop()
    await started.stop()  # stopping twice is allowed
    assert children() == []


@pytest.mark.asyncio(loop_scope="module")
async def test_two_workers_generate_the_same_text_as_one(
    engine: Engine, killed_replica: Any
) -> None:
    assert len(children()) == 1
    answer = (await asgi.post(engine.app, "/v1/completions", BODY)).json()
    assert answer["choices"][0]["text"] == killed_replica["text"]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_stopped_engine_process_is_detected_and_killed(engine: Engine) -> None:
    body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True}
    (process,) = children()
    call = asgi.start(engine.app, "POST", "/v1/completions", body)
    await call.chunks(3)
    await engine.check_health()
    process.suspend()
    # The tiny model may have ended the first answer before.
    other = asgi.start(engine.app, "POST", "/v1/completions", body)
    with pytest.raises(EngineDeadError, match="no progress for 2 s"):
        await asgi.check_health_repeatedly(engine)
    async with asyncio.timeout(60):  # 10 s until vLLM kills it
        await engine.stop()
    assert children() == []
    await call.cancel()
    await other.cancel()
