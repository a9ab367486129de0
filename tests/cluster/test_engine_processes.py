"""vLLM's processes: two workers generate the same text as one, and all end with the replica."""

import asyncio
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.config import GeneratorConfig
from cluster.engines.factory import make_generator_engine
from cluster.errors import EngineDeadError
from cluster.models import store
from tests import asgi
from tests.cluster.engine_processes import without_trackers
from tests.cluster.tiny_llama import make_tiny_llama

pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("default")]

REPLICA = """
    import asyncio, sys
    import psutil
    from cluster.config import GeneratorConfig
    from cluster.engines.factory import make_generator_engine

    async def main():
        config = GeneratorConfig(
            name="m", model=sys.argv[1], tensor_parallel_size=2, kv_cache_memory_bytes=2**27
        )
        await make_generator_engine(config).start()
        children = psutil.Process().children(recursive=True)
        print("PROCESSES", *[child.pid for child in children], flush=True)
        await asyncio.sleep(600)

    if __name__ == "__main__":
        asyncio.run(main())
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make_tiny_llama(directory, store.resolve("smollm2-135m-instruct"))
    return directory


def make_config(model: Path, **fields: Any) -> GeneratorConfig:
    values = {"name": "m", "model": str(model), "kv_cache_memory_bytes": 2**27, **fields}
    return GeneratorConfig.model_validate(values)


def children() -> list[psutil.Process]:
    return list(without_trackers(psutil.Process().children(recursive=True)))


async def generate_text(config: GeneratorConfig, num_processes: int) -> str:
    engine = make_generator_engine(config)
    await engine.start()
    try:
        assert len(children()) == num_processes
        body = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
        answer = (await asgi.post(engine.app, "/v1/completions", body)).json()
        text: str = answer["choices"][0]["text"]
        return text
    finally:
        await engine.stop()
        await engine.stop()  # stopping twice is allowed
        assert children() == []


async def test_two_workers_generate_the_same_text_as_one(tiny: Path) -> None:
    two = await generate_text(make_config(tiny, tensor_parallel_size=2, dtype="float32"), 3)
    one = await generate_text(make_config(tiny, dtype="float32"), 1)
    assert two == one


def test_no_process_outlives_a_killed_replica(tiny: Path, tmp_path: Path) -> None:
    script = tmp_path / "replica.py"
    script.write_text(textwrap.dedent(REPLICA))
    command = [sys.executable, script, tiny]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as replica:
        assert replica.stdout is not None
        lines = iter(replica.stdout.readline, "")
        announced = next((line for line in lines if line.startswith("PROCESSES")), "")
        replica.kill()
    pids = [int(pid) for pid in announced.split()[1:]]
    assert len(pids) >= 3  # the engine's process and two workers
    deadline = time.monotonic() + 5
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_a_cancelled_start_leaves_no_process(tiny: Path) -> None:
    engine = make_generator_engine(make_config(tiny))
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(1.0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert children() == []


async def test_a_stopped_engine_process_is_detected_and_killed(tiny: Path) -> None:
    engine = make_generator_engine(make_config(tiny, stall_timeout_s=2.0, max_model_len=512))
    await engine.start()
    body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True}
    call = asgi.start(engine.app, "POST", "/v1/completions", body)
    await call.chunks(3)
    await engine.check_health()
    (process,) = children()
    process.suspend()
    with pytest.raises(EngineDeadError, match="no progress for 2 s"):
        await asgi.check_health_repeatedly(engine)
    async with asyncio.timeout(20):  # 10 s until vLLM kills it
        await engine.stop()
    assert children() == []
    await call.cancel()
