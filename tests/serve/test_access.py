"""What a tenant may see and use: its own responses, and nothing of others."""

import hashlib
import json
from typing import Any

from tests import asgi
from tests.serve.gateway_kit import Replica, World, gateway_world

RESPONSES = "/v1/responses"
STORED = "/v1/responses/{response_id}"
ROUTES = (RESPONSES, STORED, f"{STORED}/cancel", f"{RESPONSES}/render")


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


async def call(world: World, key: str, method: str, path: str, body: Any = None) -> asgi.Answer:
    return await asgi.call(world.app, method, path, body, headers={"x-api-key": key})


async def create(world: World, replica: Replica, key: str, body: Any) -> str:
    """Create a response and return its id, which vLLM takes from the request."""
    assert (await call(world, key, "POST", RESPONSES, body)).status == 200
    return str(json.loads(replica.bodies[-1])["request_id"])


async def test_stored_responses_belong_to_their_tenant() -> None:
    async with gateway_world(api_keys_sha256=[sha256("a"), sha256("b")]) as world:
        replica = await world.add("gen", "gen-1", ROUTES)
        own = await create(world, replica, "a", {"input": "x"})
        assert own != await create(world, replica, "a", {"input": "x", "request_id": own})
        for key, id_, status in [
            ("a", own, 200),
            ("b", own, 404),
            ("b", "resp_1", 404),
            ("b", own[:-1] + chr(ord(own[-1]) ^ 1), 404),
            ("b", f"x{own}", 404),
        ]:
            refer = {"input": "x", "previous_response_id": id_}
            for method, path, body in [
                ("GET", f"{RESPONSES}/{id_}", None),
                ("POST", f"{RESPONSES}/{id_}/cancel", None),
                ("POST", RESPONSES, refer),
                ("POST", f"{RESPONSES}/render", refer),
                ("POST", RESPONSES, {**refer, "input": [1]}),  # a body that the router cannot read
                ("POST", RESPONSES, json.dumps(refer).replace("_id", "\\u005fid").encode()),
            ]:
                before = len(replica.seen)
                answer = await call(world, key, method, path, body)
                assert (answer.status, len(replica.seen) - before) == (status, status == 200), path
        message = answer.json()["error"]["message"]
        assert message == f"Response with id 'x{own}' not found."


async def test_without_keys_ids_of_responses_are_not_checked() -> None:
    async with gateway_world() as world:
        replica = await world.add("gen", "gen-1", ROUTES)
        body = {"input": "x", "previous_response_id": "resp_1", "request_id": "mine"}
        assert await create(world, replica, "", body) == "mine"
        assert (await call(world, "", "GET", f"{RESPONSES}/resp_1")).status == 200
