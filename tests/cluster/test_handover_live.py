"""Greedy streams of two vLLM replicas survive failures and drains."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest

from tests.cluster.conftest import (
    ROOT,
    RunningCluster,
    router_config,
    serve_config,
    wait_until,
)
from tests.cluster.engine_processes import engines_of_cluster, has_ended

MODEL = "smollm2"
ATTEMPTS = 20
"""Requests for one answer. HAProxy also tries a killed router until Serve has noticed."""
HANDED_OVER = re.compile(
    r'^tandem_stream_handovers_total{.*outcome="continued",reason="drained"} [1-9]', re.MULTILINE
)
PROMPTS = [f"Story {number}: once upon a time" for number in range(8)]

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def two_replicas(make_cluster: Any) -> Iterator[RunningCluster]:
    generator = {
        "name": MODEL,
        "model": "smollm2-135m-instruct",
        "max_model_len": 512,
        # In bfloat16, another batch often changes the numbers enough to change a token.
        "dtype": "float32",
        "kv_cache_memory_bytes": 128 * 1024**2,
        "replicas": {"min": 2, "max": 2},
        "resources": {"cpus": 0.4},
        "routing": "least-load",
    }
    # Threads of two engines that wait for each other on the same cores slow both down.
    running: RunningCluster = make_cluster(
        config=serve_config(generators=[generator], router=router_config(2)),
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS="1",
    )
    yield running
    running.down()


class Stream:
    """A greedy completion that is read in a thread."""

    def __init__(self, http: httpx.Client, prompt: str, key: str | None = None) -> None:
        self._http = http
        self._prompt = prompt
        self._headers = {} if key is None else {"idempotency-key": key}
        self.raw = ""
        self.cut = ""
        """Part of the answer that a router sent before it was killed."""
        self.is_replay = False

    def read(self) -> None:
        """Read the answer; with a key, repeat the request if the connection breaks."""
        for _ in range(ATTEMPTS):
            try:
                return self._read()
            except httpx.TransportError:
                if not self._headers:
                    raise
                self.cut, self.raw = max(self.cut, self.raw, key=len), ""
                time.sleep(0.2)
        raise AssertionError(f"{ATTEMPTS} connections broke")

    def _read(self) -> None:
        body = {"model": MODEL, "prompt": self._prompt, "max_tokens": 100, "temperature": 0}
        fields = {"stream": True, "ignore_eos": True, **body}
        with self._http.stream(
            "POST", "/v1/completions", json=fields, headers=self._headers
        ) as response:
            self.is_replay = "idempotent-replayed" in response.headers
            for piece in response.iter_text():
                self.raw += piece

    def text(self) -> str:
        """Return the text of a complete stream, all of whose events have one id."""
        assert self.raw.endswith("data: [DONE]\n\n"), self.raw[-300:]
        lines = [line for line in self.raw.splitlines() if line.startswith("data: {")]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert len({(event["id"], event["created"]) for event in events}) == 1
        return "".join(event["choices"][0]["text"] for event in events)


def run_streams(
    url: str, disturb: Callable[[], None] | None = None, *, have_keys: bool = False
) -> list[Stream]:
    """Return all streams, complete; call ``disturb`` while they run."""
    with (
        httpx.Client(base_url=url, timeout=120) as http,
        ThreadPoolExecutor(len(PROMPTS)) as threads,
    ):
        keys = [uuid4().hex if have_keys else None for _ in PROMPTS]
        streams = [Stream(http, *each) for each in zip(PROMPTS, keys, strict=True)]
        reading = [threads.submit(stream.read) for stream in streams]
        if disturb is not None:
            wait_until(lambda: all(each.raw.count("data:") > 3 for each in streams), 60, "starting")
            disturb()
            # The first of them may have ended while the last one started.
            assert not all(each.done() for each in reading)
        for each in reading:
            each.result(timeout=120)
    return streams


def texts_of(streams: list[Stream]) -> list[str]:
    return [stream.text() for stream in streams]


@pytest.fixture(scope="module")
def undisturbed(two_replicas: RunningCluster) -> list[str]:
    return texts_of(run_streams(two_replicas.http_url))


JOB = """
import asyncio, json, logging, sys
import ray
ray.init(address=sys.argv[1], namespace="job", logging_level="ERROR")
from cluster.client import Tandem

tandem, options = Tandem(), dict(max_tokens=150, temperature=0, ignore_eos=True)
losses, handler, logger = [], logging.Handler(), logging.getLogger("cluster.client")
handler.emit = losses.append
logger.addHandler(handler)
logger.setLevel("INFO")
prompts = [f"Question {number}: where does the sun rise?" for number in range(4)]

async def stream(prompt, began):
    text = ""
    async for delta in tandem.astream(prompt, **options):
        text += delta.text
        began.set()
    return text

def stream_in_a_thread(prompt):
    return "".join(delta.text for delta in tandem.stream(prompt, **options))

async def ask(word):
    began = [asyncio.Event() for _ in prompts]
    tasks = [asyncio.create_task(stream(*each)) for each in zip(prompts, began)]
    tasks.append(asyncio.create_task(asyncio.to_thread(stream_in_a_thread, prompts[0])))
    tasks.append(asyncio.create_task(tandem.achat(prompts[1], **options)))
    await asyncio.gather(*(event.wait() for event in began))
    print(word, flush=True)
    texts = await asyncio.gather(*tasks)
    return [*texts[:-1], texts[-1].text]

async def main():
    undisturbed = await ask("UNDISTURBED")
    sys.stdin.readline()
    disturbed = await ask("RUNNING")
    print(json.dumps([undisturbed, disturbed, len(losses)]))

asyncio.run(main())
"""


def test_a_killed_router_costs_no_answer(
    two_replicas: RunningCluster, undisturbed: list[str]
) -> None:
    """A Ray job notices nothing. HTTP clients get the rest of their answers from another router."""
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, two_replicas.ray_address],
        env=two_replicas.env,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdin is not None
    assert job.stdout is not None
    victim = psutil.Process(routers_of(two_replicas)[0]["pid"])
    with job:
        assert job.stdout.readline() == "UNDISTURBED\n"
        job.stdin.write("go\n")
        job.stdin.flush()
        assert job.stdout.readline() == "RUNNING\n"
        streams = run_streams(two_replicas.http_url, victim.kill, have_keys=True)
        before, after, num_lost = json.loads(job.stdout.readline())
    assert after == before
    assert num_lost > 0
    assert job.returncode == 0
    assert texts_of(streams) == undisturbed
    cut = [stream for stream in streams if stream.cut]
    assert 0 < len(cut) < len(streams)  # each router had some
    assert all(stream.is_replay and stream.raw.startswith(stream.cut) for stream in cut)


def routers_of(cluster: RunningCluster) -> list[dict[str, Any]]:
    """Return the running routers."""
    return [each for each in cluster.deployments()["router"] if each["state"] == "RUNNING"]


def pages(http: httpx.Client, path: str) -> str:
    """Return the answers of both routers."""
    # HAProxy chooses a router for each connection.
    return "\n".join(http.get(path, headers={"connection": "close"}).text for _ in range(6))


def wait_until_complete(cluster: RunningCluster, http: httpx.Client) -> None:
    """Wait until both routers and both replicas have replaced what an earlier test killed."""

    def all_exist() -> bool:  # Serve lists killed ones until it notices
        replicas = [each for found in cluster.deployments().values() for each in found]
        return len(replicas) == 4 and all(
            each["state"] == "RUNNING" and is_running(each["pid"]) for each in replicas
        )

    def are_linked() -> bool:
        found = map(json.loads, pages(http, "/ready").splitlines())
        return all(each["pools"][MODEL]["ready"] == 2 for each in found)

    wait_until(all_exist, 200, "replacing routers and replicas")
    wait_until(are_linked, 120, "opening links", ignored=(httpx.HTTPError, ValueError, KeyError))


def is_running(pid: int) -> bool:
    try:
        return not has_ended(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def running(cluster: RunningCluster) -> set[str]:
    found = cluster.replicas().items()
    return {id_ for id_, (name, state) in found if name.endswith(MODEL) and state == "RUNNING"}


def test_a_drained_replica_hands_its_streams_over_and_is_replaced(
    two_replicas: RunningCluster, undisturbed: list[str]
) -> None:
    with httpx.Client(base_url=two_replicas.http_url, timeout=60) as http:

        def drain(target: str) -> httpx.Response:
            return http.post("/drain", params={"target": target}, json={})

        wait_until_complete(two_replicas, http)
        drained = min(running(two_replicas))

        def disturb() -> None:
            answer = drain(drained[:6]).json()
            assert answer["id"] == drained

        assert texts_of(run_streams(two_replicas.http_url, disturb)) == undisturbed
        wait_until(lambda: HANDED_OVER.search(pages(http, "/metrics")), 60, "counting hand-overs")
        head = drain("127.0.0.1")  # Ray lists its nodes
        assert head.status_code == 400
        assert "127.0.0.1 is the head node" in head.json()["error"]["message"]

    def is_replaced() -> bool:
        return len(running(two_replicas)) == 2 and drained not in two_replicas.replicas()

    wait_until(is_replaced, 200, "replacing the replica")


def replica_of(engine: psutil.Process) -> psutil.Process:
    replica = engine.parent()
    assert replica is not None
    return replica


def stop_replica(engine: psutil.Process) -> None:
    os.kill(replica_of(engine).pid, signal.SIGSTOP)


def kill_engine(engine: psutil.Process) -> None:
    engine.kill()


def kill_replica(engine: psutil.Process) -> None:
    replica_of(engine).kill()


# Nothing waits for the replacement after the last one.
@pytest.mark.parametrize("fault", [stop_replica, kill_engine, kill_replica])
def test_all_greedy_streams_are_identical(
    two_replicas: RunningCluster,
    undisturbed: list[str],
    fault: Callable[[psutil.Process], None],
) -> None:
    with httpx.Client(base_url=two_replicas.http_url, timeout=60) as http:
        wait_until_complete(two_replicas, http)
    pids = {each["pid"] for each in two_replicas.deployments()[f"generator-{MODEL}"]}
    engines = engines_of_cluster(two_replicas.home)
    engine = next(each for each in engines if replica_of(each).pid in pids)
    replica = replica_of(engine)
    try:
        streams = run_streams(two_replicas.http_url, lambda: fault(engine))
        assert texts_of(streams) == undisturbed
    finally:
        if replica.is_running() and replica.status() == psutil.STATUS_STOPPED:
            replica.resume()
    if fault is stop_replica:  # it goes on, and finds nobody to write to
        assert texts_of(run_streams(two_replicas.http_url)) == undisturbed
