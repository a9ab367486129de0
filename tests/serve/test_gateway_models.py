"""``GET /v1/models`` and ``/openapi.json`` while a replica hangs."""

import asyncio
import json
import time
from datetime import datetime

import pytest

from cluster.asgi import Receive, Scope, Send
from cluster.gateway.builtin import routes
from tests import asgi
from tests.serve.gateway_kit import ROUTES, gateway_world

CARD = {"id": "gen", "object": "model", "root": "gen", "max_model_len": 4096}
ANSWERS = {"/v1/models": {"data": [CARD]}, "/openapi.json": {"paths": {"/engine": {}}}}


class Hanging:
    """Application that answers until ``hangs`` is set."""

    def __init__(self, *, hangs: bool = False, after_head: bool = False) -> None:
        self.hangs = hangs
        self.requests = 0
        self._after_head = after_head

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests += 1
        if self.hangs and not self._after_head:
            await asyncio.Future()
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        body = json.dumps(ANSWERS[scope["path"]]).encode()
        await send({"type": "http.response.body", "body": body[:5], "more_body": True})
        if self.hangs:
            await asyncio.Future()
        await send({"type": "http.response.body", "body": body[5:]})


@pytest.mark.parametrize("after_head", [False, True])
async def test_hung_replica_is_given_up_and_the_last_good_answer_served(
    after_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "CACHE_S", 0.0)
    async with gateway_world() as world:
        app = Hanging(after_head=after_head)
        await world.serve(app, "gen", "gen-1", ROUTES)
        good = (await asgi.get(world.app, "/v1/models")).json()
        document = (await asgi.get(world.app, "/openapi.json")).json()
        assert good["data"][0] == CARD
        assert "/engine" in document["paths"]
        app.hangs = True
        started_s = time.monotonic()
        assert (await asgi.get(world.app, "/v1/models")).json() == good
        assert (await asgi.get(world.app, "/openapi.json")).json() == document
        # Each waits once for at most the timeout; a margin for stalls of the machine.
        assert time.monotonic() - started_s < 2 * routes.REPLICA_TIMEOUT_S + 30.0
        await world.until_idle()


async def test_queries_at_a_hung_replica_are_shared() -> None:
    async with gateway_world() as world:
        app = Hanging(hangs=True)
        await world.serve(app, "gen", "gen-1", ROUTES)
        calls = [asgi.start(world.app, "GET", "/v1/models") for _ in range(20)]
        await calls[0].cancel()  # the others still get their answer
        for call in calls[1:]:
            answer = await call.done()
            assert answer.status == 200
            assert "gen" in [card["id"] for card in answer.json()["data"]]
        assert app.requests == 1


async def test_anthropics_client_gets_its_fields_of_models() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        headers = {"anthropic-version": "2023-06-01"}
        listed = (await asgi.call(world.app, "GET", "/v1/models", headers=headers)).json()
        assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, "gen", "cls")
        for card in listed["data"]:
            path = f"/v1/models/{card['id']}"
            assert (await asgi.call(world.app, "GET", path, headers=headers)).json() == card
            assert (card["type"], card["display_name"]) == ("model", card["id"])
            assert datetime.fromisoformat(card["created_at"]).tzinfo is not None
        plain = (await asgi.get(world.app, "/v1/models")).json()
        assert plain.keys() == {"object", "data"}
