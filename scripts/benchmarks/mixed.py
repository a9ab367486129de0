"""Streams and classification together in the default cluster, compared with each alone.

8 streams in a closed loop (128 prompt and 64 completion tokens), and 10 requests per second of 8
texts each, whenever the responses come. Both run together for a minute before the measurement, so
that the autoscaler has acted; then alone and together in turn.
"""

import argparse
import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path

import httpx

from benchmarks import token_times
from benchmarks.classify import texts
from benchmarks.endpoint import Endpoint, TargetError
from benchmarks.engine.measure import HttpSender, PromptMaker
from benchmarks.engine.servers import find_scale_events, prepare_model
from benchmarks.report import Report, Table, print_progress
from benchmarks.rounds import Summary, interleave, percentile
from benchmarks.targets.tandem import tandem_default
from benchmarks.token_times import StreamLoad, TokenTimes
from cluster.launch.log_files import log_directory

STREAMS = 8
CLASSIFIER = "sentiment"
TEXTS = 8
NUM_TEXTS = 4096
REQUESTS_PER_S = 10.0
SECONDS, QUICK_SECONDS = 20.0, 5.0
WARM_UP_S, QUICK_WARM_UP_S = 60.0, 5.0
TIMEOUT_S = 60.0
ALONE, TOGETHER = "alone", "together"
STREAM, CLASSIFY, BOTH = "stream", "classify", "both"
METRICS = ("stream_p99", "stream_ttft_p99", "classify_p99")
GOALS = {"stream_p99_ratio": "<= 1.5", "classify_p99_ratio": "<= 1.5"}

Milliseconds = dict[tuple[str, str], list[float]]
"""Percentiles by metric, and alone or together; one per round."""


@dataclass(frozen=True, slots=True)
class MixedLoad:
    """The two loads on one cluster."""

    endpoint: Endpoint
    prompts: PromptMaker
    chunks: Sequence[list[str]]
    """Texts of the classification requests, used in turn."""

    def run(self, kinds: str, seconds: float, *seed: int | str) -> tuple[TokenTimes, list[float]]:
        """Run one load or both; return the streams' times and the classification's seconds.

        Raises:
            TargetError: A response was not 200.
        """
        return asyncio.run(self._run(kinds, seconds, seed))

    async def _run(
        self, kinds: str, seconds: float, seed: tuple[int | str, ...]
    ) -> tuple[TokenTimes, list[float]]:
        streams = asyncio.to_thread(self._stream, seconds, seed)
        classify = self._classify(seconds)
        if kinds == BOTH:
            return await asyncio.gather(streams, classify)
        if kinds == STREAM:
            classify.close()
            return await streams, []
        streams.close()
        return TokenTimes(), await classify

    def _stream(self, seconds: float, seed: tuple[int | str, ...]) -> TokenTimes:
        sender = HttpSender(self.endpoint)
        prompts = (self.prompts.make_prompts(1, number, *seed)[0] for number in count())
        requests = (sender.encode(prompt) for prompt in prompts)
        return token_times.measure(self.endpoint, StreamLoad(requests, STREAMS, 0, 0, seconds))

    async def _classify(self, seconds: float) -> list[float]:
        """Send requests when they are due, independent of the responses."""
        num_requests = int(seconds * REQUESTS_PER_S)
        durations_s: list[float] = []
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with (
            httpx.AsyncClient(
                base_url=self.endpoint.url, timeout=TIMEOUT_S, limits=limits
            ) as client,
            asyncio.TaskGroup() as group,
        ):
            began = time.perf_counter()
            for number, chunk in zip(range(num_requests), cycle(self.chunks), strict=False):
                due_s = number / REQUESTS_PER_S
                await asyncio.sleep(due_s - (time.perf_counter() - began))
                group.create_task(_classify_one(client, chunk, began + due_s, durations_s))
        return durations_s


async def _classify_one(
    client: httpx.AsyncClient, chunk: list[str], due: float, durations_s: list[float]
) -> None:
    response = await client.post("/classify", json={"model": CLASSIFIER, "input": chunk})
    if response.status_code != httpx.codes.OK:
        raise TargetError(f"/classify returned {response.status_code}: {response.text[:300]}")
    durations_s.append(time.perf_counter() - due)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=SECONDS, help="duration of each load")


def run(args: argparse.Namespace) -> Report:
    seconds = QUICK_SECONDS if args.quick else args.seconds
    prompts = PromptMaker.from_model(Path(prepare_model()))
    chunks = texts.chunks(texts.load(NUM_TEXTS), TEXTS)
    milliseconds: Milliseconds = defaultdict(list)
    with tandem_default() as ready:
        load = MixedLoad(ready.running.endpoint, prompts, chunks)
        load.run(BOTH, QUICK_WARM_UP_S if args.quick else WARM_UP_S, "warm-up")
        for number, kinds in interleave((STREAM, CLASSIFY, BOTH), args.rounds):
            found = percentiles_ms(*load.run(kinds, seconds, number))
            for metric, value in found.items():
                milliseconds[metric, TOGETHER if kinds == BOTH else ALONE].append(value)
            shown = ", ".join(f"{metric} {value:.1f} ms" for metric, value in found.items())
            print_progress(number, kinds, shown)
        events = find_scale_events(log_directory(ready.running.home.path))
    return make_report(milliseconds, ready.command, events)


def percentiles_ms(times: TokenTimes, durations_s: list[float]) -> dict[str, float]:
    """Return the 99th percentiles of what was measured, in milliseconds."""
    values = dict(zip(METRICS, (times.itl_s, times.ttft_s, durations_s), strict=True))
    return {metric: percentile(found, 99) * 1e3 for metric, found in values.items() if found}


def make_report(milliseconds: Milliseconds, command: str, events: list[str]) -> Report:
    """Return the ratio of together to alone in each round."""
    summaries = {key: Summary(tuple(values)) for key, values in milliseconds.items()}
    rows = [(m, summaries[m, ALONE], summaries[m, TOGETHER]) for m in METRICS]
    return Report(
        keys={f"{metric}_ratio": together.over(alone) for metric, alone, together in rows},
        goals=GOALS,
        tables=[Table("Milliseconds, 99th percentile", ("", ALONE, TOGETHER), rows)],
        details={f"{metric}_ms_{where}": each for (metric, where), each in summaries.items()},
        notes=[
            f"{STREAMS} streams; {REQUESTS_PER_S:g} requests/s of {TEXTS} texts. stream_p99 is the "
            "time between two tokens.",
            *events,
        ],
        commands={"cluster": command},
    )
