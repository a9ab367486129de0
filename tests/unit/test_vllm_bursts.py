"""An idle engine waits for the requests that its replica prepares."""

import multiprocessing
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.asgi import Receive, Scope, Send
from cluster.engines.vllm import bursts
from cluster.engines.vllm.bursts import Arrival, gather_bursts, num_arriving
from cluster.engines.vllm.requests import TrackRequest, note_arrivals


class Core:
    """Stands for ``EngineCoreProc``: waits for the first request and takes what is there."""

    def __init__(self) -> None:
        self.input_queue: queue.Queue[tuple[str, Arrival]] = queue.Queue()
        self.taken: list[str] = []

    def has_work(self) -> bool:
        return bool(self.taken)

    def _process_input_queue(self) -> None:
        if not self.taken:
            self._handle_client_request(*self.input_queue.get())
        while not self.input_queue.empty():
            self._handle_client_request(*self.input_queue.get_nowait())

    def _handle_client_request(self, name: str, arrival: Arrival) -> None:
        arrival.end()
        self.taken.append(name)


class GatheringCore(Core):
    pass


gather_bursts(GatheringCore)


@pytest.fixture(autouse=True)
def ends_at_zero() -> Iterator[None]:
    assert num_arriving() == 0
    yield
    assert num_arriving() == 0


def start_burst(core: Core, num_requests: int, gap_s: float) -> threading.Thread:
    arrivals = [Arrival() for _ in range(num_requests)]

    def send() -> None:
        for number, arrival in enumerate(arrivals):
            core.input_queue.put((f"r{number}", arrival))
            time.sleep(gap_s)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize(("core", "gathers"), [(Core(), False), (GatheringCore(), True)])
def test_an_idle_engine_starts_with_the_whole_burst(
    monkeypatch: pytest.MonkeyPatch, core: Core, gathers: bool
) -> None:
    monkeypatch.setattr(bursts, "QUIET_S", 5.0)
    monkeypatch.setattr(bursts, "MAX_WAIT_S", 0.5)
    sending = start_burst(core, 5, 0.02)
    core._process_input_queue()
    assert (len(core.taken) == 5) == gathers
    sending.join()
    core._process_input_queue()
    assert len(core.taken) == 5


def test_a_request_that_is_not_finished_soon_holds_up_others_only_briefly() -> None:
    core, slow = GatheringCore(), Arrival()  # such as one whose image is fetched
    core.input_queue.put(("r0", Arrival()))
    began = time.monotonic()
    core._process_input_queue()
    assert time.monotonic() - began >= bursts.QUIET_S
    assert core.taken == ["r0"]
    slow.end()


def test_a_busy_engine_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bursts, "QUIET_S", 600.0)
    monkeypatch.setattr(bursts, "MAX_WAIT_S", 600.0)
    core, slow = GatheringCore(), Arrival()
    core.taken.append("running")
    core._process_input_queue()
    slow.end()


def test_a_lone_request_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bursts, "QUIET_S", 600.0)
    monkeypatch.setattr(bursts, "MAX_WAIT_S", 600.0)
    core = GatheringCore()
    core.input_queue.put(("r0", Arrival()))
    core._process_input_queue()
    assert core.taken == ["r0"]


def test_a_fork_sees_requests_that_arrive_later() -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    go = context.Event()

    def report() -> None:
        go.wait()
        sender.send(num_arriving())

    process = context.Process(target=report)
    process.start()
    arrivals = [Arrival(), Arrival()]
    go.set()
    assert receiver.recv() == 2
    process.join()
    for arrival in arrivals:
        arrival.end()


@pytest.mark.parametrize("reaches_engine", [True, False])
async def test_a_request_arrives_until_the_engine_has_it_or_it_ends(reaches_engine: bool) -> None:
    seen = []

    async def add_request(request: Any) -> None:
        seen.append(num_arriving())

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if reaches_engine:
            await note_arrivals(add_request)(None)
        seen.append(num_arriving())

    scope = {"type": "http", "path": "/v1/completions", "extensions": {}}
    await TrackRequest(app)(scope, None, None)  # type: ignore[arg-type]
    assert seen == ([1, 0] if reaches_engine else [1])
    await note_arrivals(add_request)(None)  # without an HTTP request
