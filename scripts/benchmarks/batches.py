"""Interactive streams in the default cluster, with a batch and without.

Two streams in a closed loop with pauses of up to 4 s (128 prompt and 64 completion tokens each),
alone and while a batch of completions runs on the same model. The batch is cancelled after each
round.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import httpx

from benchmarks import token_times
from benchmarks.endpoint import Endpoint, TargetError
from benchmarks.engine.measure import HttpSender, PromptMaker
from benchmarks.engine.servers import prepare_model
from benchmarks.report import Report, Table, print_progress
from benchmarks.rounds import Summary, interleave, percentile
from benchmarks.targets.tandem import tandem_default
from benchmarks.token_times import StreamLoad, TokenTimes

STREAMS = 2
PAUSE_S = 4.0
SECONDS, QUICK_SECONDS = 60.0, 10.0
WARM_UP_S = 10.0
LINES = 2000
LINE_TOKENS = 64
TIMEOUT_S = 60.0
PATH = "/v1/completions"
ALONE, BATCH = "alone", "with a batch"
METRICS = ("ttft_p99", "itl_p99")
GOALS = {"ttft_p99_ratio": "<= 1.1", "itl_p99_ratio": "<= 1.1"}

Milliseconds = dict[tuple[str, str], list[float]]
"""Percentiles by metric, and alone or with a batch; one per round."""


class RunningBatch:
    """A batch of the target that runs until ``stop``."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._client = httpx.Client(
            base_url=endpoint.url, headers=endpoint.headers, timeout=TIMEOUT_S
        )
        files = {"file": ("bench.jsonl", make_lines(endpoint.model))}
        file = self._post("/v1/files", data={"purpose": "batch"}, files=files)
        body = {"input_file_id": file["id"], "endpoint": PATH, "completion_window": "24h"}
        self._path = f"/v1/batches/{self._post('/v1/batches', json=body)['id']}"

    def count_lines(self) -> int:
        """Return the finished lines."""
        return int(self._client.get(self._path).json()["request_counts"]["completed"])

    def stop(self) -> None:
        """Cancel the batch and wait for its end."""
        self._post(f"{self._path}/cancel")
        deadline = time.monotonic() + TIMEOUT_S
        while self._client.get(self._path).json()["status"] != "cancelled":
            if time.monotonic() > deadline:
                raise TargetError(f"The batch was not cancelled within {TIMEOUT_S:g} s.")
            time.sleep(0.2)
        self._client.close()

    def _post(self, path: str, **body: object) -> dict[str, object]:
        response = self._client.post(path, **body)  # type: ignore[arg-type]
        if response.status_code != httpx.codes.OK:
            raise TargetError(f"{path} returned {response.status_code}: {response.text[:300]}")
        found: dict[str, object] = response.json()
        return found


def make_lines(model: str) -> bytes:
    """Return the file of a batch."""
    body = {
        "model": model,
        "prompt": "Once upon a time",
        "max_tokens": LINE_TOKENS,
        "ignore_eos": True,
    }
    lines = (
        {"custom_id": str(number), "method": "POST", "url": PATH, "body": body}
        for number in range(LINES)
    )
    return b"\n".join(json.dumps(line).encode() for line in lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=SECONDS, help="duration of each load")


def run(args: argparse.Namespace) -> Report:
    seconds = QUICK_SECONDS if args.quick else args.seconds
    prompts = PromptMaker.from_model(Path(prepare_model()))
    milliseconds: Milliseconds = defaultdict(list)
    lines_per_s: list[float] = []
    num_requests: list[float] = []
    with tandem_default() as ready:
        endpoint = ready.running.endpoint
        measure(endpoint, prompts, WARM_UP_S, "warm-up")
        for number, kind in interleave((ALONE, BATCH), args.rounds):
            batch = RunningBatch(endpoint) if kind == BATCH else None
            times = measure(endpoint, prompts, seconds, number)
            if batch is not None:
                lines_per_s.append(batch.count_lines() / times.wall_s)
                batch.stop()
            num_requests.append(len(times.ttft_s))
            found = percentiles_ms(times)
            for metric, value in found.items():
                milliseconds[metric, kind].append(value)
            shown = ", ".join(f"{metric} {value:.1f} ms" for metric, value in found.items())
            print_progress(number, kind, shown)
    details = {"batch_lines_per_s": lines_per_s, "requests_per_round": num_requests}
    return make_report(milliseconds, details, ready.command)


def measure(
    endpoint: Endpoint, prompts: PromptMaker, seconds: float, seed: int | str
) -> TokenTimes:
    """Run the streams and return their times."""
    sender = HttpSender(endpoint)
    made = (prompts.make_prompts(1, number, seed)[0] for number in count())
    requests = (sender.encode(prompt) for prompt in made)
    return token_times.measure(endpoint, StreamLoad(requests, STREAMS, PAUSE_S, 0, seconds))


def percentiles_ms(times: TokenTimes) -> dict[str, float]:
    """Return the 99th percentiles, in milliseconds."""
    values = dict(zip(METRICS, (times.ttft_s, times.itl_s), strict=True))
    return {metric: percentile(found, 99) * 1e3 for metric, found in values.items() if found}


def make_report(
    milliseconds: Milliseconds, details: Mapping[str, list[float]], command: str
) -> Report:
    """Return the ratio of the percentiles with a batch to those without, in each round."""
    summaries = {key: Summary(tuple(values)) for key, values in milliseconds.items()}
    rows = [(m, summaries[m, ALONE], summaries[m, BATCH]) for m in METRICS]
    return Report(
        keys={f"{metric}_ratio": batch.over(alone) for metric, alone, batch in rows},
        goals=GOALS,
        tables=[Table("Milliseconds, 99th percentile", ("", ALONE, BATCH), rows)],
        details={name: Summary(tuple(values)) for name, values in details.items()},
        notes=[
            f"{STREAMS} streams with pauses of up to {PAUSE_S:g} s; lines of {LINE_TOKENS} tokens "
            "in the batch."
        ],
        commands={"cluster": command},
    )
