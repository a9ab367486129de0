"""Requests that their clients abandon at random moments leave the engine idle.

Clients leave between the parts of a request, in the queue, before the first byte, in mid-stream
and after the end; they write head and body in one write or in two, and close or reset the
connection.
"""

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping

import httpx
import pytest

from tests.cluster.conftest import RunningCluster, wait_until

SEED = 12
IDLE_S = 1.0
"""Time after which the engine must have dropped abandoned requests; a machine may stall in a few
rounds."""
SHORT_TOKENS, LONG_TOKENS = 4, 1500
"""Tokens of answers that end before some clients leave, and that outlast the test."""

pytestmark = pytest.mark.timeout(600)


def is_idle(http: httpx.Client, model: str) -> bool:
    pool = http.get("/ready").json()["pools"][model]
    return not (pool["running"] or pool["in_flight"] or pool["queued"])


async def send_and_leave(url: httpx.URL, model: str, max_leave_s: float, seed: str) -> str:
    """Send a request and leave at a random moment; return what had been read by then."""
    rng = random.Random(seed)
    body = json.dumps(
        {
            "model": model,
            "prompt": "Once upon a time",
            "max_tokens": rng.choice([SHORT_TOKENS, LONG_TOKENS, LONG_TOKENS]),
            "stream": rng.random() < 0.5,
            "ignore_eos": True,
        }
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(url.host, url.port)
    read = b""
    try:
        async with asyncio.timeout(rng.uniform(0, max_leave_s)):
            if rng.random() < 0.5:
                writer.write(head.encode() + body)
            else:
                writer.write(head.encode())
                await asyncio.sleep(rng.choice([0.001, 0.05]))
                writer.write(body)
            while chunk := await reader.read(65536):
                read += chunk
    except TimeoutError:
        pass
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()
    if not read:
        return "nothing"
    assert read.startswith(b"HTTP/1.1 200 "), read
    return "all" if b"[DONE]" in read or b'"usage":{' in read else "a part"


def abandon(
    cluster: RunningCluster,
    model: str,
    *,
    rounds: int,
    clients: int,
    max_leave_s: float,
    least: Mapping[str, int],
) -> None:
    """Abandon ``rounds * clients`` requests; after each round, the engine must become idle.

    On a slow machine, further rounds follow, in which clients leave later, until ``least`` clients
    have read nothing, a part and all.
    """
    url = httpx.URL(cluster.http_url)
    read: Counter[str] = Counter()
    idle_after_s = []

    async def one_round(number: int, max_leave_s: float) -> list[str]:
        seeds = (f"{SEED} {number} {client}" for client in range(clients))
        return await asyncio.gather(*(send_and_leave(url, model, max_leave_s, s) for s in seeds))

    with httpx.Client(base_url=cluster.http_url, timeout=60) as http:
        for number in range(2 * rounds):
            leave_s = max_leave_s * (1 if number < rounds else 4)
            read.update(asyncio.run(one_round(number, leave_s)))
            began = time.monotonic()
            wait_until(lambda: is_idle(http, model), 60, "dropping the requests")
            idle_after_s.append(time.monotonic() - began)
            if number + 1 >= rounds and all(read[part] >= num for part, num in least.items()):
                break
        else:
            pytest.fail(f"clients left at these moments only: {read}")
        assert statistics.median(idle_after_s) < IDLE_S
        time.sleep(IDLE_S)
        assert is_idle(http, model)


def test_2000_abandoned_requests_leave_a_simulated_engine_idle(sims: RunningCluster) -> None:
    # Two thirds of the requests wait in the router's queue.
    least = {"nothing": 20, "a part": 20, "all": 20}
    abandon(sims, "sim", rounds=20, clients=100, max_leave_s=0.5, least=least)


def test_200_abandoned_requests_leave_vllm_idle(cluster: RunningCluster) -> None:
    least = {"nothing": 10, "a part": 10}
    abandon(cluster, "smollm2", rounds=4, clients=50, max_leave_s=2.5, least=least)
