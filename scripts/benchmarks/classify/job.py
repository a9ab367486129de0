"""Another Ray job that classifies through the client: ``python -m benchmarks.classify.job``.

Arguments: Ray's address, texts in a call, calls at a time, seconds, and the file for the result.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

from benchmarks.classify import texts
from cluster.client import Tandem

NUM_TEXTS = 4096


async def _drive(tandem: Tandem, size: int, at_a_time: int, seconds: float) -> float:
    requests = texts.chunks(texts.load(NUM_TEXTS), size)
    end = 0.0

    async def ask(first: int) -> int:
        done = 0
        while time.perf_counter() < end:
            done += len(await tandem.aclassify(requests[(first + done // size) % len(requests)]))
        return done

    for part in (seconds / 4, seconds):  # the first one warms up
        begun = time.perf_counter()
        end = begun + part
        counts = await asyncio.gather(*(ask(i * 7) for i in range(at_a_time)))
    return sum(counts) / (time.perf_counter() - begun)


def _main(address: str, size: str, at_a_time: str, seconds: str, result: str) -> None:
    rate = asyncio.run(_drive(Tandem(address=address), int(size), int(at_a_time), float(seconds)))
    Path(result).write_text(json.dumps(rate), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
