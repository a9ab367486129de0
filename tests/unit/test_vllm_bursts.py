"""An idle engine waits for the requests that its replica prepares."""

import multiprocessing
import queue
from typing import Any

import pytest

from cluster.asgi import Receive, Scope, Send
from cluster.engines.vllm import bursts
from cluster.engines.vllm.bursts import (
    MAX_WAIT_S,
    QUIET_S,
    Arrival,
    Arrivals,
    gathering,
)
from cluster.engines.vllm.requests import TrackRequest, note_arrivals


class Core:
    """Stands for ``EngineCoreProc``, whose replica sends a request every ``gap_s``."""

    def __init__(self, arrivals: Arrivals, num_requests: int, gap_s: float) -> None:
        self.input_queue = self
        self.now_s = 0.0
        self.taken: list[str] = []
        self._gap_s = gap_s
        self._coming = [(f"r{number}", arrivals.begin()) for number in range(num_requests)]

    def has_work(self) -> bool:
        return bool(self.taken)

    def _process_input_queue(self) -> None:
        if not self.taken:
            self._handle_client_request(*self.get(timeout=self._gap_s))

    def get(self, timeout: float) -> tuple[str, Arrival]:
        if not self._coming or timeout < self._gap_s:
            self.now_s += timeout
            raise queue.Empty
        self.now_s += self._gap_s
        name, arrival = self._coming.pop(0)
        arrival.end()
        return name, arrival

    def _handle_client_request(self, name: str, arrival: Arrival) -> None:
        self.taken.append(name)


def make_core(
    monkeypatch: pytest.MonkeyPatch, arrivals: Arrivals, num_requests: int, gap_s: float
) -> Core:
    class GatheringCore(Core):
        _process_input_queue = gathering(Core._process_input_queue, arrivals)

    core = GatheringCore(arrivals, num_requests, gap_s)
    monkeypatch.setattr(bursts.time, "monotonic", lambda: core.now_s)
    return core


def test_an_idle_engine_starts_with_the_whole_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core(monkeypatch, Arrivals(), 9, 0.002)
    core._process_input_queue()
    assert len(core.taken) == 9
    assert core.now_s == pytest.approx(9 * 0.002 + QUIET_S)


def test_the_wait_for_a_burst_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core(monkeypatch, Arrivals(), 1000, 0.002)
    core._process_input_queue()
    assert core.now_s == pytest.approx(MAX_WAIT_S, abs=0.005)


def test_a_slow_request_holds_up_others_only_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals = Arrivals()
    arrivals.begin()  # such as one whose image is fetched
    core = make_core(monkeypatch, arrivals, 1, 0.001)
    core._process_input_queue()
    assert core.taken == ["r0"]
    assert core.now_s <= 0.001 + QUIET_S


def test_a_busy_engine_and_a_lone_request_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals = Arrivals()
    core = make_core(monkeypatch, arrivals, 1, 0.001)
    core._process_input_queue()
    assert core.now_s == 0.001
    arrivals.begin()
    core._process_input_queue()
    assert core.now_s == 0.001


def test_a_fork_sees_requests_that_arrive_later() -> None:
    context, arrivals = multiprocessing.get_context("fork"), Arrivals()
    receiver, sender = context.Pipe(duplex=False)
    go = context.Event()

    def report() -> None:
        go.wait()
        sender.send(arrivals.num)

    process = context.Process(target=report)
    process.start()
    arrivals.begin()
    arrivals.begin()
    go.set()
    assert receiver.recv() == 2
    process.join()


@pytest.mark.parametrize("reaches_engine", [True, False])
@pytest.mark.parametrize(("path", "counts"), [("/v1/completions", 1), ("/v1/models", 0)])
async def test_a_request_arrives_until_the_engine_gets_it_or_it_ends(
    reaches_engine: bool, path: str, counts: int
) -> None:
    arrivals, seen = Arrivals(), []

    async def add_request(request: Any) -> None:
        seen.append(arrivals.num)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(arrivals.num)
        if reaches_engine:
            await note_arrivals(add_request)(None)

    scope = {"type": "http", "path": path, "extensions": {}}
    await TrackRequest(app, arrivals)(scope, None, None)  # type: ignore[arg-type]
    assert seen == ([counts, 0] if reaches_engine else [counts])
    assert arrivals.num == 0
    await note_arrivals(add_request)(None)  # without an HTTP request
