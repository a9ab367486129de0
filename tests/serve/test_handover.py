"""Running answers are handed over to another replica."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cluster.asgi import Receive, Scope, Send, journal_of, usage_of
from cluster.errors import EngineDeadError
from cluster.gateway.pools.handover import KeptAnswer
from tests import asgi
from tests.serve.gateway_kit import CHAT, World, gateway_world, metrics

CHUNKS = [f'data: {{"n": {n}, "text": "é😀"}}\n\n'.encode() for n in range(12)]
CHUNKS += [CHUNKS[0][:9], CHUNKS[0][9:-6], CHUNKS[0][-6:], b"data: [DONE]\n\n"]
ANSWER = b"".join(CHUNKS)
BODY = {"model": "gen", "stream": True, "messages": [{"role": "user", "content": "x" * 50}]}
HANDOVERS = "tandem_stream_handovers_total"


class Script:
    """Application that streams CHUNKS; each is an entry. It stops before one if the test says so.

    Then it waits for ``go_on``, or fails as a dead engine does.
    """

    def __init__(
        self, *, stop_at: int | None = None, dies: bool = False, chunks: list[bytes] = CHUNKS
    ) -> None:
        self.stop_at = stop_at
        self.dies = dies
        self.chunks = chunks
        self.stopped = asyncio.Event()
        self.go_on = asyncio.Event()
        self.bodies: list[bytes] = []
        self.earlier: list[bytes] = []
        self.num_cancelled = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        self.bodies.append(body + message["body"])
        journal = journal_of(scope)
        earlier = b"" if journal is None else journal.earlier
        self.earlier.append(earlier)
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await self._stream(len(earlier), journal, send)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        usage = usage_of(scope)
        usage.prompt_tokens, usage.completion_tokens = 7, len(CHUNKS)
        await send({"type": "http.response.body", "body": b""})

    async def _stream(self, num_earlier: int, journal: Any, send: Send) -> None:
        for number, chunk in enumerate(self.chunks):
            if number == self.stop_at and number >= num_earlier:
                self.stopped.set()
                if self.dies:
                    raise EngineDeadError("The engine of the replica died; try again.")
                await self.go_on.wait()
            if journal is not None and number >= num_earlier:
                journal.add(b"+")
            await send({"type": "http.response.body", "body": chunk, "more_body": True})


@asynccontextmanager
async def world_with(*replicas: Script, key: str = "k", **router: Any) -> AsyncIterator[World]:
    async with gateway_world(routing="least-load", **router) as world:
        for number, replica in enumerate(replicas, 1):
            await world.serve(replica, "gen", f"gen-{number}", resume_key=key)
        yield world


async def start(world: World, first: Script) -> asgi.Call:
    """Begin an answer and wait until its replica has stopped."""
    call = asgi.start(world.app, "POST", CHAT, BODY)
    await first.stopped.wait()
    await call.chunks(1)
    return call


async def handovers(world: World, reason: str) -> tuple[float, float]:
    """Return the hand-overs that continued an answer, and those that failed."""
    await world.until_idle()
    counts = await metrics(world)
    return (
        counts[HANDOVERS, "gen", "continued", reason],
        counts[HANDOVERS, "gen", "failed", reason],
    )


@pytest.mark.parametrize("stop_at", range(1, len(CHUNKS)))
async def test_an_answer_goes_on_after_its_replica_was_killed(stop_at: int) -> None:
    first, second = Script(stop_at=stop_at), Script()
    async with world_with(first) as world:
        call = await start(world, first)
        await world.serve(second, "gen", "gen-2", resume_key="k")
        await world.kill("gen-1")
        assert (await call.done()).body == ANSWER
        assert second.bodies == first.bodies
        assert second.earlier == [b"+" * stop_at]
        assert await handovers(world, "lost") == (1, 0)
        counts = await metrics(world)
        assert counts["tandem_prompt_tokens_total", "gen"] == 7
        assert counts["tandem_completion_tokens_total", "gen"] == len(CHUNKS)
        assert counts["tandem_cut_off_requests_total", "gen"] == 0
        assert counts["tandem_requests_total", "gen", CHAT, "200"] == 1


async def test_an_answer_goes_on_after_its_engine_died() -> None:
    first, second = Script(stop_at=5, dies=True), Script()
    async with world_with(first) as world:
        call = asgi.start(world.app, "POST", CHAT, BODY)
        await call.chunks(1)
        # The replica with the dead engine is still linked, and must not get the answer again.
        await world.serve(second, "gen", "gen-2", resume_key="k")
        assert (await call.done()).body == ANSWER
        assert await handovers(world, "unavailable") == (1, 0)
        assert len(first.bodies) == 1


async def test_an_answer_waits_for_a_new_replica() -> None:
    first, second = Script(stop_at=5), Script()
    async with world_with(first) as world:
        call = await start(world, first)
        await world.kill("gen-1")
        world.remove("gen", "gen-1")
        await asyncio.sleep(0.1)
        await world.serve(second, "gen", "gen-2", resume_key="k")
        assert (await call.done()).body == ANSWER


async def test_an_answer_waits_while_serve_still_lists_its_dead_replicas() -> None:
    first, second, third = Script(stop_at=5), Script(stop_at=8), Script()
    async with world_with(first) as world:
        call = await start(world, first)
        await world.serve(second, "gen", "gen-2", resume_key="k")
        await world.kill("gen-1")
        await second.stopped.wait()
        await world.kill("gen-2")
        # The links to both fail again and again, until Serve notices that the replicas are dead.
        pool = world.gateway.pools["gen"]
        await world.until(lambda: all(r.state == "fallback" for r in pool.replicas.running))
        await world.serve(third, "gen", "gen-3", ready=1, resume_key="k")
        assert (await call.done()).body == ANSWER


async def test_an_answer_survives_two_replicas_that_another_request_kills() -> None:
    first, second, third = Script(stop_at=5), Script(stop_at=5), Script()
    async with world_with(first) as world:
        call = await start(world, first)
        await world.serve(second, "gen", "gen-2", resume_key="k")
        await world.kill("gen-1")
        await second.stopped.wait()
        await world.serve(third, "gen", "gen-3", ready=2, resume_key="k")
        await world.kill("gen-2")
        assert (await call.done()).body == ANSWER


async def test_answers_move_away_from_a_draining_replica() -> None:
    first, second = Script(stop_at=5), Script()
    async with world_with(first) as world:
        call = await start(world, first)
        await world.serve(second, "gen", "gen-2", resume_key="k")
        world.servers["gen-1"].retire()
        assert (await call.done()).body == ANSWER
        assert await handovers(world, "drained") == (1, 0)
        assert first.num_cancelled == 1


def num_kept_answers() -> int:
    gc.collect()
    return sum(type(each) is KeptAnswer for each in gc.get_objects())


async def test_a_move_keeps_nothing_of_the_answer() -> None:
    first, second = Script(stop_at=5), Script()
    before = num_kept_answers()
    async with world_with(first) as world:
        call = await start(world, first)
        await world.serve(second, "gen", "gen-2", resume_key="k")
        world.servers["gen-1"].retire()
        assert (await call.done()).body == ANSWER
        assert await handovers(world, "drained") == (1, 0)
        del call
        assert num_kept_answers() == before


async def test_answers_move_away_from_a_replica_that_serve_stops() -> None:
    first, second = Script(stop_at=5), Script()
    async with world_with(first) as world:
        call = await start(world, first)
        await world.serve(second, "gen", "gen-2", resume_key="k")
        world.remove("gen", "gen-1")
        assert (await call.done()).body == ANSWER
        assert await handovers(world, "drained") == (1, 0)


async def test_answers_of_a_draining_replica_move_once_there_is_another() -> None:
    first, second = Script(stop_at=5), Script()
    async with world_with(first) as world:
        call = await start(world, first)
        world.servers["gen-1"].retire()
        await world.until(lambda: world.gateway.pools["gen"].replicas.running[0].is_draining)
        await world.serve(second, "gen", "gen-2", resume_key="k", ready=1)
        world.remove("gen", "gen-1")
        assert (await call.done()).body == ANSWER
        assert await handovers(world, "drained") == (1, 0)


async def test_a_draining_replica_without_others_finishes_its_answers() -> None:
    first = Script(stop_at=5)
    async with world_with(first) as world:
        call = await start(world, first)
        world.servers["gen-1"].retire()
        await asyncio.sleep(0.1)
        first.go_on.set()
        assert (await call.done()).body == ANSWER
        assert await handovers(world, "drained") == (0, 0)


async def test_moving_answers_do_not_overload_other_replicas() -> None:
    first, second = Script(stop_at=5), Script(stop_at=7)
    async with world_with(first) as world:  # max_in_flight: 2
        calls = [await start(world, first) for _ in range(2)]
        await world.serve(second, "gen", "gen-2", resume_key="k")
        others = [asgi.start(world.app, "POST", CHAT, BODY) for _ in range(2)]
        await second.stopped.wait()
        while len(second.bodies) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        world.servers["gen-1"].retire()
        await asyncio.sleep(0.1)
        assert len(second.bodies) == 2
        second.go_on.set()
        for call in (*calls, *others):
            assert (await call.done()).body == ANSWER
        assert await handovers(world, "drained") == (2, 0)


async def test_an_answer_is_handed_over_several_times() -> None:
    scripts = [Script(stop_at=number) for number in (2, 5, 9)] + [Script()]
    async with world_with(scripts[0]) as world:
        call = await start(world, scripts[0])
        for number, script in enumerate(scripts[1:], 2):
            await world.serve(script, "gen", f"gen-{number}", resume_key="k")
            await world.kill(f"gen-{number - 1}")
            world.remove("gen", f"gen-{number - 1}")
            if script.stop_at is not None:
                await script.stopped.wait()
                while call.answer.body != b"".join(CHUNKS[: script.stop_at]):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        assert (await call.done()).body == ANSWER
        assert await handovers(world, "lost") == (3, 0)


async def test_an_answer_survives_two_engines_that_another_request_kills() -> None:
    first, second, third = Script(stop_at=5, dies=True), Script(stop_at=5, dies=True), Script()
    async with world_with(first) as world:
        call = await start(world, first)
        await world.serve(second, "gen", "gen-2", resume_key="k")
        await second.stopped.wait()
        await world.serve(third, "gen", "gen-3", resume_key="k")
        assert (await call.done()).body == ANSWER
        assert sum(await handovers(world, "unavailable")) == 2


async def test_an_answer_that_kills_engines_kills_three_at_most() -> None:
    first, others = Script(stop_at=5, dies=True), [Script(stop_at=5, dies=True) for _ in range(4)]
    async with world_with(first, *others) as world:
        answer = await asgi.start(world.app, "POST", CHAT, BODY).done()
        assert b"try again" in answer.body
        assert sum(len(script.bodies) for script in (first, *others)) == 3


@pytest.mark.parametrize(
    "router",
    [
        {"handover": {"enabled": False}},
        {"handover": {"max_kept_bytes": 0}},
    ],
)
async def test_without_handover_an_answer_ends_with_an_error(router: dict[str, Any]) -> None:
    first, second = Script(stop_at=5), Script()
    async with world_with(first, **router) as world:
        call = await start(world, first)
        await world.serve(second, "gen", "gen-2", resume_key="k")
        await world.kill("gen-1")
        answer = await call.done()
        assert answer.body.startswith(b"".join(CHUNKS[:5]))
        assert b"try again" in answer.body
        assert not second.bodies


@pytest.mark.parametrize("key", ["", "another model"])
async def test_replicas_of_another_kind_do_not_continue_an_answer(key: str) -> None:
    first, second = Script(stop_at=5), Script()
    async with world_with(first) as world:
        call = await start(world, first)
        await world.serve(second, "gen", "gen-2", resume_key=key)
        await world.kill("gen-1")
        world.remove("gen", "gen-1")  # until then it could come back and continue the answer
        assert b"try again" in (await call.done()).body
        assert not second.bodies


async def test_an_answer_that_would_differ_ends_with_an_error() -> None:
    first, second = Script(stop_at=5), Script(chunks=[b"data: other\n\n", *CHUNKS])
    async with world_with(first) as world:
        call = await start(world, first)
        await world.serve(second, "gen", "gen-2", resume_key="k")
        await world.kill("gen-1")
        answer = await call.done()
        assert answer.body.startswith(b"".join(CHUNKS[:5]))
        assert b"data: other" not in answer.body
        assert b"no other can continue" in answer.body
        assert len(second.bodies) == 1
        circuit = world.gateway.pools["gen"].replicas.guard.circuit("gen-2")
        assert circuit.bad == 0  # not the replica's fault
        assert (await handovers(world, "lost"))[0] == 0


async def test_a_client_that_disconnects_during_a_handover_holds_nothing() -> None:
    first, second = Script(stop_at=5), Script(stop_at=5)
    async with world_with(first) as world:
        call = await start(world, first)
        await world.serve(second, "gen", "gen-2", resume_key="k")
        await world.kill("gen-1")
        await second.stopped.wait()
        await call.cancel()
        await world.until_idle()
        assert second.num_cancelled == 1
        assert world.gateway.pools["gen"].limits.handover.used_bytes == 0


async def test_answers_move_away_from_a_silent_replica() -> None:
    first, second = Script(stop_at=5), Script(stop_at=8)
    async with world_with(first) as world:
        call = await start(world, first)
        await world.serve(second, "gen", "gen-2", resume_key="k")
        for connection in world.servers["gen-1"].connections:
            connection.write = lambda *_: None  # type: ignore[method-assign]  # it hangs
        await asyncio.wait_for(second.stopped.wait(), 60)
        for connection in world.servers["gen-1"].connections:
            del connection.write
        first.go_on.set()
        second.go_on.set()
        assert (await call.done()).body == ANSWER
        await world.until_idle(20)  # the usage that it would report is not awaited long
        assert await handovers(world, "hung") == (1, 0)


async def test_an_answer_that_hangs_replicas_hangs_three_at_most() -> None:
    scripts = [Script(stop_at=5) for _ in range(4)]
    async with world_with(*scripts) as world:
        call = asgi.start(world.app, "POST", CHAT, BODY)
        hung: set[str] = set()
        for _ in range(3):
            await world.until(lambda: len(_stopped(scripts)) > len(hung))  # noqa: B023
            hung |= (new := _stopped(scripts) - hung)
            for connection in (c for name in new for c in world.servers[name].connections):
                connection.write = lambda *_: None  # type: ignore[method-assign]
        answer = await call.done()
        assert b"try again" in answer.body
        assert _stopped(scripts) == hung
        assert await handovers(world, "hung") == (0, 3)  # the third one finds no other replica
        for name in hung:
            for connection in world.servers[name].connections:
                connection.__dict__.pop("write", None)
        for script in scripts:
            script.go_on.set()


def _stopped(scripts: list[Script]) -> set[str]:
    """Return the replicas that ``world_with`` made of these scripts and that wait in an answer."""
    return {f"gen-{i + 1}" for i, script in enumerate(scripts) if script.stopped.is_set()}


@pytest.mark.parametrize("headers", [{}, {"idempotency-key": "a"}])
async def test_requests_without_an_answer_move_away_from_a_silent_replica(
    headers: dict[str, str],
) -> None:
    async with world_with() as world:
        first = await world.add("cls", "cls-1")
        body = {"model": "cls", "wait_before": True}
        call = asgi.start(world.app, "POST", "/v1/embeddings", body, headers)
        await world.until(lambda: bool(first.bodies))
        second = await world.add("cls", "cls-2")
        second.gate.set()
        for connection in world.servers["cls-1"].connections:
            connection.write = lambda *_: None  # type: ignore[method-assign]  # it hangs
        answer = await call.done()
        assert answer.json()["replica"] == "cls-2"
        for connection in world.servers["cls-1"].connections:
            del connection.write
        await world.until_idle()
        assert (await metrics(world))["tandem_failovers_total", "cls", "hung"] == 1


async def test_a_replica_that_wakes_up_cannot_write_to_the_answer() -> None:
    first, second = Script(stop_at=5), Script(stop_at=8)
    async with world_with(first) as world:
        call = await start(world, first)
        await world.serve(second, "gen", "gen-2", resume_key="k")
        # The router gives the silent link up; the replica goes on once it runs again.
        link = world.gateway.pools["gen"].replicas.running[0].link
        await link.close()
        await second.stopped.wait()
        first.go_on.set()
        await asyncio.sleep(0.1)
        second.go_on.set()
        assert (await call.done()).body == ANSWER
