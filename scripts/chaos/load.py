"""Steady load: greedy streams and classifications over HTTP, and a Ray job.

Each client sends its next request after the previous one has ended, and pauses after a failure.
"""

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import httpx

from benchmarks.endpoint import TargetError
from benchmarks.targets.home import LOG_LINES
from benchmarks.targets.running import REAL_MODEL
from chaos.accounting import Attempt, Connection, measure
from chaos.target import CLASSIFY, JOB, STREAM, Cluster
from cluster.launch import processes

STREAMS = 3
CLASSIFIERS = 2
MAX_TOKENS = 48
TIMEOUT_S = 90.0
"""Time without data after which a request fails; above the router's default queue timeout."""
PAUSE_S = 0.1
START_S = 90.0
"""Time until every kind of request has succeeded once."""
PROMPTS = ("Once upon a time", "The capital of France is", "Water boils at", "In the year 2000")
ERROR_CHARS = 120
TEXTS = ("A wonderful film.", "A boring mess.", "It was fine, mostly.")


class FailedRequestError(Exception):
    """Response that is an error or incomplete."""


class Load:
    """Context manager that sends requests from its entry to its exit."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.attempts: list[Attempt] = []
        self._cluster = cluster
        self._seed = seed
        self._stopped = threading.Event()
        kinds = [STREAM] * STREAMS + [CLASSIFY] * CLASSIFIERS
        self._threads = [
            threading.Thread(target=self._send_all, args=(kind, number))
            for number, kind in enumerate(kinds)
        ]
        self._defect: Exception | None = None
        self._job: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def __enter__(self) -> "Load":
        self._job = self._start_job()
        assert self._job.stdout is not None
        reader = threading.Thread(target=self._read_job, args=(self._job.stdout,))
        self._threads.append(reader)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        assert self._job is not None
        assert self._job.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._job.stdin.close()
        try:
            self._job.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._job.kill()
            self._job.wait()
        for thread in self._threads:
            thread.join()
        self._log.close()

    def wait_served(self) -> None:
        """Wait until every kind of request has succeeded once.

        Raises:
            TargetError: One has not within ``START_S``, or the job exited.
        """
        deadline = time.monotonic() + START_S
        while missing := self.missing():
            if time.monotonic() > deadline:
                failed = [attempt for attempt in self.attempts if attempt.error][-3:]
                raise TargetError(f"No success of {missing} within {START_S:g} s: {failed}")
            self.check()
            time.sleep(PAUSE_S)

    def missing(self) -> set[str]:
        """Return the kinds of requests without a success."""
        return {STREAM, CLASSIFY, JOB} - {one.kind for one in self.attempts if not one.error}

    def check(self) -> None:
        """Raise TargetError if the job or a client has ended, or the defect that ended it."""
        if self._defect is not None:
            raise self._defect
        if self._job is not None and self._job.poll() is not None:
            self._log.seek(0)
            lines = self._log.read().strip().splitlines()[-LOG_LINES:]
            problem = f"The Ray job exited with status {self._job.returncode}."
            raise TargetError("\n".join([problem, *lines]))
        if not all(thread.is_alive() for thread in self._threads):
            raise TargetError("A thread that sends or records requests has ended.")

    def _send_all(self, kind: str, number: int) -> None:
        rng = random.Random(f"{self._seed} {number}")
        send = {STREAM: stream, CLASSIFY: classify}[kind]
        http = httpx.Client(
            base_url=self._cluster.state.http_url,
            headers=self._cluster.headers,
            timeout=TIMEOUT_S,
            trust_env=False,
        )
        try:
            with http:
                while not self._stopped.is_set():
                    attempt = measure(kind, send(http, rng), describe)
                    self.attempts.append(attempt)
                    if attempt.error or kind == CLASSIFY:
                        self._stopped.wait(PAUSE_S)
        except Exception as error:  # raised again by ``check``
            self._defect = error

    def _start_job(self) -> subprocess.Popen[str]:
        state = self._cluster.state
        return subprocess.Popen(
            [sys.executable, "-m", "chaos.job", state.ray_address, state.application],
            env={
                **os.environ,
                processes.CLUSTER_ID: state.cluster_id,
                processes.HOME: str(self._cluster.home),
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            },
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # Ctrl-C must reach only this process
        )

    def _read_job(self, lines: IO[str]) -> None:
        for line in lines:
            if line.startswith("{"):  # Ray writes to stdout, too
                self.attempts.append(Attempt(**json.loads(line)))


def stream(http: httpx.Client, rng: random.Random) -> Iterator[str]:
    """Send a greedy completion; yield its prompt, then the text in each line of its stream."""
    prompt = rng.choice(PROMPTS)
    body = {
        "model": REAL_MODEL,
        "prompt": prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    line = ""
    with http.stream("POST", "/v1/completions", json=body) as answer:
        raise_for_status(answer)
        yield prompt
        for line in filter(None, answer.iter_lines()):
            raise_for_event(line)
            yield text_of(line)
    if line != "data: [DONE]":
        raise FailedRequestError("incomplete stream")


def text_of(line: str) -> str:
    """Return the text in a line of a stream of completions; empty for ``[DONE]``."""
    data = line.removeprefix("data:").strip()
    return str(json.loads(data)["choices"][0]["text"]) if data.startswith("{") else ""


def classify(http: httpx.Client, rng: random.Random) -> Iterator[httpx.Response]:
    """Send a classification; yield its response."""
    answer = http.post("/classify", json={"input": rng.choice(TEXTS)})
    raise_for_status(answer)
    yield answer


def describe(error: Exception) -> tuple[str, Connection]:
    """Return a short name of an error, and what failed about its connection."""
    match error:
        case FailedRequestError():
            return str(error), ""
        case httpx.TimeoutException():
            return f"no data for {TIMEOUT_S:g} s", ""
        case httpx.TransportError():
            refused = isinstance(error, httpx.ConnectError)
            return type(error).__name__, "refused" if refused else "broken"
        case _:  # an unexpected answer must not end the load
            return f"{type(error).__name__}: {error}"[:ERROR_CHARS], ""


def raise_for_status(answer: httpx.Response) -> None:
    """Raise FailedRequestError with the status and the type of the error."""
    if answer.is_success:
        return
    answer.read()
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        raise FailedRequestError(f"{answer.status_code} of HAProxy") from None
    raise FailedRequestError(f"{answer.status_code} {describe_body(error)}")


def raise_for_event(line: str) -> None:
    """Raise FailedRequestError if a line of a stream is an error event."""
    data = line.removeprefix("data:").strip()
    if not data.startswith("{"):
        return
    error = json.loads(data).get("error")
    if error is not None:
        raise FailedRequestError(f"error event {describe_body(error)}")


def describe_body(error: Mapping[str, Any]) -> str:
    """Return the type and the message of an error, without numbers, so that equal ones add up."""
    return re.sub(r"\d[\d.]*", "N", f"{error['type']}: {error['message']}")[:ERROR_CHARS]
