"""Steady load: streams, classifications, a slow reader, and a Ray job with Tandem's client.

Each client sends its next request after the previous one has ended. A request whose connection
breaks or is refused is sent again with the same Idempotency-Key.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx

from benchmarks.endpoint import TargetError
from benchmarks.targets.home import LOG_LINES
from cluster.launch import processes
from cluster.ray_internals import LOOPBACK_VARIABLE
from resilience.accounting import Answer, kind_of
from resilience.mixes import Mix
from resilience.testbed import CLASSIFIER, MODEL, Testbed

TIMEOUT_S = 90.0
"""Time without data after which a request fails; above the router's default queue timeout."""
RETRY_S = 60.0
"""Time for which a request is sent again after its connection broke."""
PAUSE_S = 0.1
START_S = 90.0
"""Time until every client has succeeded once."""
ERROR_CHARS = 160
LABELLED = {"A wonderful film.": "positive", "A boring mess.": "negative"}


class FailedRequestError(Exception):
    """Response that is an error, incomplete or wrong."""


class LostRouterError(Exception):
    """HAProxy's answer to a request whose router was lost before it answered (502)."""


@dataclass(slots=True)
class Attempts:
    """Attempts of one request so far."""

    key: str
    data_s: list[float] = field(default_factory=list)
    broken_s: list[float] = field(default_factory=list)

    def note_data(self) -> None:
        self.data_s.append(time.monotonic())


Send = Callable[[httpx.AsyncClient, Attempts], Awaitable[str]]
"""Send a request once; return what a greedy answer must equal, or an empty string."""


class Load:
    """Context manager that sends requests from its entry to its exit, in a thread."""

    def __init__(self, testbed: Testbed, mix: Mix, seed: int) -> None:
        self.answers: list[Answer] = []
        self.expected: dict[str, str] = {}
        """Answer of each greedy client in a run without faults: its first answer."""
        self._testbed = testbed
        self._mix = mix
        self._seed = seed
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run)]
        self._defect: BaseException | None = None
        self._job: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def __enter__(self) -> "Load":
        if self._mix.job:
            self._job = self._start_job()
            assert self._job.stdout is not None
            reader = threading.Thread(target=self._read_job, args=(self._job.stdout,))
            self._threads.append(reader)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        if self._job is not None and self._job.stdin is not None:
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
        """Wait until every client has succeeded once.

        Raises:
            TargetError: One has not within ``START_S``, or the job exited.
        """
        clients = {*self._mix.clients(), *(["job"] if self._mix.job else [])}
        deadline = time.monotonic() + START_S
        while missing := clients - {one.client for one in self.answers if not one.error}:
            if time.monotonic() > deadline:
                failed = [answer for answer in self.answers if answer.error][-3:]
                raise TargetError(f"No success of {sorted(missing)} in {START_S:g} s: {failed}")
            self.check()
            time.sleep(PAUSE_S)

    def check(self) -> None:
        """Raise TargetError if the job has ended, or the defect that ended the load."""
        if self._defect is not None:
            raise self._defect
        if self._job is not None and self._job.poll() is not None:
            self._log.seek(0)
            lines = self._log.read().strip().splitlines()[-LOG_LINES:]
            problem = f"The Ray job exited with status {self._job.returncode}."
            raise TargetError("\n".join([problem, *lines]))

    # -- HTTP clients -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._run_clients())
        except BaseException as error:  # raised again by ``check``
            self._defect = error

    async def _run_clients(self) -> None:
        async with asyncio.TaskGroup() as clients:
            for name in self._mix.clients():
                clients.create_task(self._repeat(name))

    async def _repeat(self, name: str) -> None:
        rng = random.Random(f"{self._seed} {name}")
        kind = kind_of(name)
        send = self._sender(kind, name, rng)
        # A small buffer, so that what the slow reader has not read is in the cluster.
        options = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)] if kind == "slow" else None
        transport = httpx.AsyncHTTPTransport(socket_options=options)
        url = self._testbed.state.http_url
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, transport=transport) as http:
            while not self._stopped.is_set():
                answer = await self._answer(name, http, send)
                self.answers.append(answer)
                if answer.error or kind == "classify":
                    await asyncio.sleep(PAUSE_S)

    async def _answer(self, name: str, http: httpx.AsyncClient, send: Send) -> Answer:
        attempts = Attempts(key=uuid.uuid4().hex)
        began_s = time.monotonic()
        text, error = "", ""
        while True:
            try:
                text = await send(http, attempts)
            except (httpx.TransportError, LostRouterError) as failure:
                is_broken = not isinstance(failure, httpx.TimeoutException)
                if is_broken:
                    attempts.broken_s.append(time.monotonic())
                if is_broken and time.monotonic() < began_s + RETRY_S:
                    await asyncio.sleep(PAUSE_S)
                    continue
                error = type(failure).__name__
            except Exception as failure:  # an unexpected answer must not end the load
                error = f"{type(failure).__name__}: {failure}"[:ERROR_CHARS]
            break
        expected = self.expected.setdefault(name, text) if text else ""
        return Answer(
            name,
            began_s,
            time.monotonic(),
            tuple(attempts.data_s),
            error,
            tuple(attempts.broken_s),
            diverged=not error and text != expected,
        )

    def _sender(self, kind: str, name: str, rng: random.Random) -> Send:
        mix = self._mix
        if kind == "classify":
            return classify
        body: dict[str, Any] = {"prompt": f"Story {name}: once upon a time", "temperature": 0}
        if kind == "slow":
            many = {"prompt": [body["prompt"]] * mix.slow_prompts, "max_tokens": mix.max_tokens}
            return lambda http, attempts: stream(http, {**body, **many}, attempts, PAUSE_S)
        if kind == "greedy":
            # A different phase of each client, so that not all streams end at the same time.
            tokens = mix.max_tokens + rng.randrange(mix.max_tokens)
            return lambda http, attempts: stream(http, {**body, "max_tokens": tokens}, attempts)
        body = {**body, "temperature": 1.0}

        async def send(http: httpx.AsyncClient, attempts: Attempts) -> str:
            await stream(http, {**body, "max_tokens": mix.max_tokens}, attempts)
            return ""

        return send

    # -- Ray job ------------------------------------------------------------------------------

    def _start_job(self) -> subprocess.Popen[str]:
        state = self._testbed.state
        return subprocess.Popen(
            [sys.executable, "-m", "resilience.job", state.ray_address, state.application],
            env={
                **os.environ,
                processes.CLUSTER_ID: state.cluster_id,
                processes.HOME: str(self._testbed.home),
                LOOPBACK_VARIABLE: "0",
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
                self.answers.append(Answer(**json.loads(line)))


async def stream(
    http: httpx.AsyncClient, body: Mapping[str, Any], attempts: Attempts, pause_s: float = 0.0
) -> str:
    """Stream a completion; return its texts in order of the choices.

    Raises:
        FailedRequestError: The answer is an error, or does not have all tokens once.
    """
    fields = {
        "model": MODEL,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **body,
    }
    raw = bytearray()
    headers = {"idempotency-key": attempts.key}
    async with http.stream("POST", "/v1/completions", json=fields, headers=headers) as response:
        if not response.is_success:
            raise_for_error(response.status_code, await response.aread())
        async for piece in response.aiter_raw(4096 if pause_s else None):
            raw += piece
            attempts.note_data()
            if pause_s:
                await asyncio.sleep(pause_s)
    num_prompts = len(fields["prompt"]) if isinstance(fields["prompt"], list) else 1
    return text_of(raw.decode(), fields["max_tokens"] * num_prompts)


def text_of(raw: str, num_tokens: int) -> str:
    """Return the texts of a complete stream, joined in order of the choices.

    Raises:
        FailedRequestError: The stream is incomplete or has another number of tokens.
    """
    texts: dict[int, list[str]] = {}
    counted = None
    ids = set()
    lines = [line.removeprefix("data: ") for line in raw.splitlines() if line.startswith("data: ")]
    for event in (json.loads(line) for line in lines if line != "[DONE]"):
        if "error" in event:
            raise FailedRequestError(f"error event {describe_body(event['error'])}")
        ids.add((event["id"], event["created"]))
        for choice in event["choices"]:
            texts.setdefault(choice["index"], []).append(choice["text"])
        if usage := event.get("usage"):
            counted = usage["completion_tokens"]
    if not lines or lines[-1] != "[DONE]":
        raise FailedRequestError("incomplete stream")
    if counted != num_tokens:
        raise FailedRequestError(f"{counted} tokens instead of {num_tokens}")
    if len(ids) != 1:
        raise FailedRequestError("id or time changed within the stream")
    return "\n".join("".join(texts[index]) for index in sorted(texts))


async def classify(http: httpx.AsyncClient, attempts: Attempts) -> str:
    """Classify a text whose label is known.

    Raises:
        FailedRequestError: The answer is an error, or another label.
    """
    text = random.Random(attempts.key).choice([*LABELLED])  # a repetition sends the same text
    headers = {"idempotency-key": attempts.key}
    body = {"model": CLASSIFIER, "input": text}
    response = await http.post("/classify", json=body, headers=headers)
    if not response.is_success:
        raise_for_error(response.status_code, response.content)
    label = response.json()["data"][0]["label"]
    if label.lower() != LABELLED[text]:
        raise FailedRequestError(f"label {label}")
    attempts.note_data()
    return ""


def raise_for_error(status: int, content: bytes) -> None:
    """Raise LostRouterError, or FailedRequestError with the status and the type of an error."""
    if status == httpx.codes.BAD_GATEWAY:
        raise LostRouterError
    try:
        error = describe_body(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        error = content[:ERROR_CHARS].decode(errors="replace")
    raise FailedRequestError(f"{status} {error}")


def describe_body(error: Mapping[str, Any]) -> str:
    """Return the type and the message of an error, without numbers, so that equal ones add up."""
    return re.sub(r"\d[\d.]*", "N", f"{error['type']}: {error['message']}")[:ERROR_CHARS]
