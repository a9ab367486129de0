"""Answers of the simulated engine go on at another replica, byte for byte."""

from typing import Any

import pytest

from cluster.config import GeneratorConfig
from cluster.engines.sim import SimEngine
from tests import asgi
from tests.serve.gateway_kit import World, gateway_world, metrics

MESSAGES = [{"role": "user", "content": "Tell me a story."}]
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": MESSAGES}),
    "usage": (
        "/v1/chat/completions",
        {"messages": MESSAGES, "stream_options": {"include_usage": True}},
    ),
    "stop": ("/v1/chat/completions", {"messages": MESSAGES, "stop": ["bak", "zz"]}),
    "prompts": ("/v1/completions", {"prompt": ["One", "Two", "Three"]}),
    "ids": ("/v1/completions", {"prompt": "One", "return_token_ids": True}),
    "responses": ("/v1/responses", {"input": "Tell me a story."}),
    "messages": ("/v1/messages", {"messages": MESSAGES}),
}


async def start_engine() -> SimEngine:
    sim = {"decode_s_per_token": 0.005, "startup_s": 0, "prefill_s_per_token": 0}
    config = {"name": "gen", "model": "m", "engine": "sim", "sim": sim}
    engine = SimEngine(GeneratorConfig.model_validate(config))
    await engine.start()
    return engine


async def add_replica(world: World, engine: SimEngine, name: str) -> None:
    routes = engine.routes()
    await world.serve(engine.app, "gen", name, routes, resume_key=engine.resume_key)


@pytest.mark.parametrize("cell", CELLS)
async def test_every_api_goes_on_after_its_replica_was_killed(cell: str) -> None:
    path, fields = CELLS[cell]
    limit = "max_output_tokens" if cell == "responses" else "max_tokens"
    body = {"model": "gen", "stream": True, limit: 30, **fields}
    headers = {"x-request-id": "r-1"}
    first, second = await start_engine(), await start_engine()
    async with gateway_world(routing="least-load") as world:
        await add_replica(world, first, "gen-1")
        call = asgi.start(world.app, "POST", path, body, headers)
        await call.chunks(8)
        await add_replica(world, second, "gen-2")
        await world.kill("gen-1")
        answer = await call.done()
        await world.until_idle()
        counts = await metrics(world)
        assert counts["tandem_stream_handovers_total", "gen", "continued", "lost"] == 1
        # The second replica alone gives the same answer, but for its time.
        undisturbed = await asgi.start(world.app, "POST", path, body, headers).done()
        assert without_times(answer) == without_times(undisturbed)
        usage = "tandem_completion_tokens_total", "gen"
        assert 2 * counts[usage] == (await metrics(world))[usage]
    await first.stop()
    await second.stop()


def without_times(answer: asgi.Answer) -> list[Any]:
    """Return an answer's events without the time at which it began, and the ids made of it."""
    found = answer.data()
    for event in found:
        event.pop("created", None)
        for part in (event, event.get("item", {}), *event.get("response", {}).get("output", ())):
            part.pop("item_id", None)
            if str(part.get("id", "")).startswith("msg_"):
                part.pop("id")
        event.get("response", {}).pop("created_at", None)
    return found
