"""Ray job that classifies through Tandem's client.

Runs as ``python -m benchmarks.classify.job ADDRESS SIZE CONCURRENCY SECONDS OUT``, where SIZE is
the number of texts per call. Writes the texts per second to OUT.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

from benchmarks.classify import texts
from cluster.client import Tandem

NUM_TEXTS = 4096


async def _drive(tandem: Tandem, size: int, concurrency: int, seconds: float) -> float:
    requests = texts.chunks(texts.load(NUM_TEXTS), size)
    end = 0.0

    async def call_repeatedly(first: int) -> int:
        done = 0
        while time.perf_counter() < end:
            done += len(await tandem.aclassify(requests[(first + done // size) % len(requests)]))
        return done

    for part in (seconds / 4, seconds):  # the first run warms up
        began = time.perf_counter()
        end = began + part
        counts = await asyncio.gather(*(call_repeatedly(i * 7) for i in range(concurrency)))
    return sum(counts) / (time.perf_counter() - began)


def _main(address: str, size: str, concurrency: str, seconds: str, result: str) -> None:
    rate = asyncio.run(_drive(Tandem(address=address), int(size), int(concurrency), float(seconds)))
    Path(result).write_text(json.dumps(rate), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
