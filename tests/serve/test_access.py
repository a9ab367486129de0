"""Access of tenants to stored responses, and limits on headers, bodies and nesting."""

import asyncio
import hashlib
import json
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.gateway.body import MAX_JSON_DEPTH
from tests import asgi
from tests.serve.browser import listening
from tests.serve.gateway_kit import CHAT, Replica, World, gateway_world

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


async def test_large_headers_get_431_and_leave_the_link_alone() -> None:
    async with gateway_world(max_header_bytes=4096) as world:
        replica = await world.add("gen", "gen-1")
        running = asgi.start(world.app, "POST", CHAT, {"wait_before": True})
        await world.until(lambda: len(replica.seen) == 1)
        for path, headers in [
            (CHAT, {"x-large": "x" * 4096}),
            (CHAT, {f"x-{n}": "x" * 40 for n in range(100)}),
            (f"{CHAT}?{'q' * 4096}", {}),
        ]:
            answer = await asgi.post(world.app, path, {}, headers=headers)
            assert answer.status == 431
            error = answer.json()["error"]
            assert error["type"] == "RequestHeaderFieldsTooLargeError"
            assert "limit is 4096 bytes" in error["message"]
        assert (await asgi.post(world.app, CHAT, {}, headers={"x": "x" * 3000})).status == 200
        replica.gate.set()
        assert (await running.done()).status == 200


@pytest.mark.parametrize(("open_", "close"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
async def test_deeply_nested_json_gets_400(open_: str, close: str) -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")

        async def nested(levels: int) -> asgi.Answer:
            body = f'{{"x": {open_ * levels}1{close * levels}}}'
            return await asgi.post(world.app, CHAT, body.encode())

        for too_many in (MAX_JSON_DEPTH, 1000, 100_000):
            answer = await nested(too_many)
            assert answer.status == 400
            assert "nested too deeply" in answer.json()["error"]["message"]
        assert (await nested(MAX_JSON_DEPTH // 2 - 1)).status == 200
        flat = {"x": [[]] * 1000, "y": "[" * 1000, "z": '\\"' + "{" * 1000}
        assert (await asgi.post(world.app, CHAT, flat)).status == 200


async def test_bodies_have_a_common_limit_and_are_dropped_when_the_answer_begins() -> None:
    async with gateway_world(max_body_bytes=300_000, max_buffered_bytes=400_000) as world:
        replica = await world.add("gen", "gen-1")
        large = {"x": "x" * 200_000}
        first = asgi.start(world.app, "POST", CHAT, {**large, "wait_before": True})
        await world.until(lambda: len(replica.seen) == 1)
        refused = await asgi.post(world.app, CHAT, large)
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        assert "limit is 400000 bytes" in refused.json()["error"]["message"]
        chunked = await asgi.post(world.app, CHAT, large, headers={"content-length": ""})
        assert chunked.status == 429
        assert (await asgi.post(world.app, CHAT, {})).status == 200
        replica.gate.set()
        assert (await first.done()).status == 200
        replica.gate.clear()
        streams = []
        for _ in range(2):
            body = {**large, "stream": 1, "wait_after": True}
            streams.append(asgi.start(world.app, "POST", CHAT, body))
            await streams[-1].chunks(1)
            assert streams[-1].answer.status == 200
        assert world.gateway.buffers.used_bytes == 0
        replica.gate.set()
        for stream in streams:
            assert (await stream.done()).status == 200
        abandoned = asgi.start(world.app, "POST", CHAT, {**large, "wait_before": True})
        replica.gate.clear()
        await abandoned.cancel()
        assert world.gateway.buffers.used_bytes == 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/nowhere", 404),
        ("POST", "/metrics", 405),
        ("GET", "/v1/models", 200),
        ("GET", CHAT, 200),
    ],
)
async def test_bodies_are_not_read_for_paths_that_need_none(
    method: str, path: str, status: int
) -> None:
    async with gateway_world(max_body_bytes=1024) as world:
        await world.add("gen", "gen-1")
        await world.add("cls", "cls-1", ("/classify",))
        answer = await asgi.call(world.app, method, path, b"x" * 2000)
        assert (answer.status, answer.headers["connection"]) == (status, "close")


async def test_figures_and_request_ids_of_other_tenants_are_visible_to_operators_only() -> None:
    hashes = {"api_keys_sha256": [sha256("a"), sha256("b")], "operator_keys_sha256": [sha256("o")]}
    async with gateway_world(**hashes) as world:
        await world.add("gen", "gen-1")
        await world.add("cls", "cls-1", ("/classify",))
        for key in "ab":
            await call(world, key, "POST", CHAT, {})
            for path, body in ((CHAT, {"model": "unknown"}), ("/nowhere", {})):
                assert (await call(world, key, "POST", path, body)).status == 404
            assert (await call(world, key, "POST", CHAT, {"fail": True})).status == 500
        await call(world, "wrong", "POST", CHAT, {})

        tenants = {key: sha256(key)[:16] for key in "abo"}
        own = await figures(world, "a")
        assert set(own["tenant"]) == {tenants["a"]}
        assert set(own) == {"tenant"}
        everything = await figures(world, "o")
        assert {tenants["a"], tenants["b"]} <= set(everything["tenant"])
        assert "gen" in everything["model"]

        data = (await call(world, "a", "GET", "/dashboard/data")).json()
        assert {failure["tenant"] for failure in data["failures"]} == {tenants["a"]}
        assert sorted(failure["status"] for failure in data["failures"]) == [404, 404, 500]
        assert (data["changes"], data["decisions"]) == ([], None)
        assert data["pools"]["gen"]["replicas"] == []
        assert not any(data["levels"][""].values())
        assert (await call(world, "a", "GET", "/dashboard/report")).status == 403

        data = (await call(world, "o", "GET", "/dashboard/data")).json()
        assert {f["tenant"] for f in data["failures"]} == {"", tenants["a"], tenants["b"]}
        assert data["pools"]["gen"]["replicas"][0]["id"] == "gen-1"
        assert (await call(world, "o", "GET", "/dashboard/report")).status == 200


async def test_slow_upload_gets_408() -> None:
    limits = {"header_timeout_s": 1, "min_upload_bytes_per_s": "1MiB"}
    async with gateway_world(**limits) as world, listening(world.app) as url:
        await world.add("gen", "gen-1")
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 9000000\r\n\r\n"
        writer.write(head.encode() + bytes(1000))
        answer = await asyncio.wait_for(reader.read(), 30)
        writer.close()
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"RequestTimeoutError" in answer


async def test_ready_shows_the_pools_to_operators_only() -> None:
    hashes = {"api_keys_sha256": [sha256("a")], "operator_keys_sha256": [sha256("o")]}
    async with gateway_world(**hashes) as world:
        assert (await asgi.get(world.app, "/ready")).status == 503
        await world.add("gen", "gen-1")
        await world.add("cls", "cls-1", ("/classify",))
        for key in ("", "wrong", "a"):
            ready = await call(world, key, "GET", "/ready")
            assert (ready.status, ready.json()) == (200, {"status": "ready"}), key
        pools = (await call(world, "o", "GET", "/ready")).json()["pools"]
        assert pools["gen"]["replicas"] == 1
        for path in ("/health", "/version", "/explain", "/dashboard", "/playground"):
            assert (await call(world, "wrong", "GET", path)).status == 200


async def figures(world: World, key: str) -> dict[str, list[str]]:
    """Return the values of the labels ``tenant`` and ``model`` in the metrics that a key sees."""
    text = (await call(world, key, "GET", "/metrics")).body.decode()
    found: dict[str, list[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            label = "tenant" if "tenant" in sample.labels else "model"
            found.setdefault(label, []).append(sample.labels.get(label, ""))
    return found


async def test_without_keys_everything_is_visible() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        await call(world, "", "POST", CHAT, {"fail": True})
        assert "gen" in (await figures(world, ""))["model"]
        data = (await call(world, "", "GET", "/dashboard/data")).json()
        assert len(data["failures"]) == 1
        assert data["pools"]["gen"]["replicas"]
