"""HTTP interface of the gateway: paths, models, API keys, errors and metrics."""

import hashlib
from typing import Any

import pytest

from cluster.asgi import Message
from cluster.metrics import table
from tests import asgi
from tests.serve.gateway_kit import CHAT, REQUESTS_TOTAL, gateway_world, metrics


async def test_request_id_is_generated_or_validated() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        assert len((await asgi.post(world.app, CHAT, {})).headers["x-request-id"]) == 32
        for bad in ("a" * 500, "a\tb", "\x7f"):
            answer = await asgi.post(world.app, CHAT, {}, headers={"x-request-id": bad})
            assert answer.status == 400
            assert answer.json()["error"]["param"] == "x-request-id"


async def test_model_selects_the_pool() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        await world.add("cls", "cls-1", ("/classify", "/v1/embeddings"))
        for model, path, replica in [
            ("gen", CHAT, "gen-1"),
            (None, CHAT, "gen-1"),
            ("cls", "/classify", "cls-1"),
            (None, "/classify", "cls-1"),
            ("gen", "/v1/embeddings", "gen-1"),
            (None, "/v1/embeddings", "cls-1"),
        ]:
            answer = await asgi.post(world.app, path, {"model": model})
            assert answer.json()["replica"] == replica


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        (CHAT, {"model": "nope"}, 404, "Known models: cls, gen"),
        ("/v1/tasks/translate", {}, 404, "Add `applications: {}`"),
        ("/v1/knowledge", {}, 404, "Add `applications: {}`"),
        (CHAT, b"{", 400, "not valid JSON"),
        (CHAT, b"\xff\xfe", 400, "not valid JSON"),
        (CHAT, b"[1]", 400, "object"),
        (CHAT, {"model": 3}, 400, "model"),
        (CHAT, {"model": "cls"}, 400, "does not serve"),
        ("/nowhere", {}, 404, "No such path"),
        ("/nowhere", {"model": "gen"}, 404, "No such path"),
        ("/load", {}, 404, "No such path"),
        ("/v1/models", {}, 405, "supports GET"),
        (CHAT, b" " * 2000, 413, "limit is 1024 bytes"),
    ],
)
async def test_bad_requests_get_a_typed_error(path: str, body: Any, status: int, says: str) -> None:
    async with gateway_world(max_body_bytes=1024) as world:
        await world.add("gen", "gen-1")
        await world.add("cls", "cls-1", ("/classify",))
        answer = await asgi.post(world.app, path, body)
        assert answer.status == status
        error = answer.json()["error"]
        assert says in error["message"]
        assert error["code"] == status
        assert set(error) == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"]


async def test_api_keys() -> None:
    digest = hashlib.sha256(b"right").hexdigest()
    async with gateway_world(api_keys_sha256=[digest]) as world:
        await world.add("gen", "gen-1")
        for headers, status in [
            ({}, 401),
            ({"authorization": "Bearer wrong"}, 401),
            ({"authorization": "Basic right"}, 401),
            ({"authorization": "Bearer "}, 401),
            ({"authorization": "Bearer right"}, 200),
            ({"x-api-key": "right"}, 200),
        ]:
            answer = await asgi.post(world.app, CHAT, {}, headers=headers)
            assert answer.status == status
        assert (await asgi.get(world.app, "/health")).status == 200
        assert (await asgi.get(world.app, "/v1/models")).status == 401


async def test_only_the_router_sets_the_tenant_header() -> None:
    digest = hashlib.sha256(b"right").hexdigest()
    for keys, tenant in (([digest], digest[:16].encode()), ([], None)):
        async with gateway_world(api_keys_sha256=keys) as world:
            replica = await world.add("gen", "gen-1")
            headers = {"x-api-key": "right", "x-tandem-tenant": "someone else"}
            await asgi.post(world.app, CHAT, {}, headers=headers)
            seen = dict(replica.seen[0]["headers"])
            assert seen.get(b"x-tandem-tenant") == tenant
            assert b"x-api-key" not in seen


async def test_application_errors_show_no_internals() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        answer = await asgi.post(world.app, CHAT, {"fail": True})
        assert answer.status == 500
        assert "secret" not in answer.body.decode()
        assert answer.json()["error"]["code"] == 500


async def test_traceback_is_logged_with_the_request_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        headers = {"x-request-id": "6b3f2f52"}
        await asgi.post(world.app, CHAT, {"fail": True}, headers=headers)
    (record,) = [record for record in caplog.records if record.exc_info]
    assert "6b3f2f52" in record.message


async def test_builtin_paths() -> None:
    async with gateway_world() as world:
        unready = await asgi.get(world.app, "/ready")
        assert unready.status == 503
        await world.add("gen", "gen-1")
        await world.add("cls", "cls-1", ("/classify",))
        ready = await asgi.get(world.app, "/ready")
        assert ready.status == 200
        assert ready.json()["pools"]["gen"]["ready"] == 1
        models = (await asgi.get(world.app, "/v1/models")).json()
        assert [card["id"] for card in models["data"]] == ["gen", "cls"]
        assert (await asgi.get(world.app, "/v1/models/cls")).json()["owned_by"] == "tandem"
        assert (await asgi.get(world.app, "/v1/models/x")).status == 404
        assert (await asgi.get(world.app, "/version")).json() == {
            "version": "0",
            "tandem": "0",
            "engine": "1",
        }
        paths = (await asgi.get(world.app, "/openapi.json")).json()["paths"]
        assert {CHAT, "/health"} <= paths.keys()
        head = await asgi.call(world.app, "HEAD", "/health")
        assert (head.status, head.body) == (200, b"")


async def test_path_with_a_parameter_is_relayed() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        answer = await asgi.get(world.app, "/v1/responses/resp_1")
        assert answer.json()["path"] == "/v1/responses/resp_1"


async def test_large_body_does_not_block_others() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        large = asgi.start(world.app, "POST", CHAT, {"text": "x" * 5_000_000})
        small = asgi.start(world.app, "POST", CHAT, {"stream": 100})
        await small.done()
        assert (await large.done()).json()["size"] > 5_000_000


async def test_root_path_is_removed() -> None:
    async with gateway_world() as world:
        messages: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b""}

        async def send(message: Message) -> None:
            messages.append(message)

        scope = {"type": "http", "method": "GET", "headers": [], "query_string": b""}
        await world.app({**scope, "path": "/llm/health", "root_path": "/llm"}, receive, send)
        assert messages[0]["status"] == 200


async def test_key_is_checked_before_the_body_is_read() -> None:
    async with gateway_world(api_keys_sha256=[hashlib.sha256(b"k").hexdigest()]) as world:
        answer = await asgi.post(world.app, CHAT, b"x" * 5_000_000)
        assert answer.status == 401
        assert answer.headers["connection"] == "close"


async def test_objectives_are_exported() -> None:
    async with gateway_world() as world:
        found = {
            key[1:]: value
            for key, value in (await metrics(world)).items()
            if key[0] == "tandem_objective_seconds"
        }
    assert found == {
        ("gen", "ttft_p90"): 2.5,  # the bucket bound above the SLO of 2 s
        ("gen", "itl_p90"): 0.25,
        ("cls", "latency_p95"): 0.5,
    }


async def test_in_flight_requests_and_tokens_are_exported() -> None:
    async with gateway_world() as world:
        replica = await world.add("gen", "gen-1")
        call = asgi.start(world.app, "POST", CHAT, {"wait_before": True})
        await world.until(lambda: len(replica.seen) == 1)
        served = await metrics(world)
        assert served["tandem_in_flight_requests", "gen"] == 1
        assert served["tandem_in_flight_tokens", "gen"] > 0
        await call.cancel()
        await world.until_idle()
        assert (await metrics(world))["tandem_in_flight_tokens", "gen"] == 0


async def test_rejected_requests_are_counted_under_their_route() -> None:
    key = hashlib.sha256(b"secret").hexdigest()
    async with gateway_world(api_keys_sha256=[key], queue_timeout_s=0.1) as world:
        await world.add("gen", "gen-1")
        await asgi.post(world.app, CHAT, {})
        await asgi.post(world.app, "/v1/responses/x", {})
        await asgi.get(world.app, "/v1/models")
        world.remove("gen", "gen-1")
        await asgi.post(world.app, CHAT, {"model": "gen"}, headers={"x-api-key": "secret"})
        counters = world.gateway.registry
        assert counters.counter(table.REQUESTS, "", CHAT, "401").value == 1
        assert counters.counter(table.REQUESTS, "", "/v1/models", "401").value == 1
        route = "/v1/responses/{response_id}"
        assert counters.counter(table.REQUESTS, "", route, "401").value == 1
        assert counters.counter(table.REQUESTS, "gen", CHAT, "503").value == 1


async def test_every_request_is_counted_once() -> None:
    async with gateway_world() as world:
        replica = await world.add("gen", "gen-1")
        await world.add("cls", "cls-1", ("/classify",))
        await asgi.post(world.app, CHAT, {"stream": 3})
        await asgi.post(world.app, CHAT, {"model": "unknown"})
        await asgi.post(world.app, CHAT, b"{")
        await asgi.post(world.app, CHAT, {"fail": True})
        await asgi.get(world.app, "/v1/responses/resp_1")
        await asgi.get(world.app, "/no/such/path")
        await asgi.get(world.app, "/health")
        call = asgi.start(world.app, "POST", CHAT, {"wait_before": True})
        await world.until(lambda: len(replica.seen) == 4)
        await call.cancel()
        await world.until_idle()
        found = await metrics(world)
        requests = {key[1:]: value for key, value in found.items() if key[0] == REQUESTS_TOTAL}
        assert requests == {
            ("gen", CHAT, "200"): 1,
            ("gen", CHAT, "499"): 1,
            ("gen", CHAT, "500"): 1,
            ("gen", "/v1/responses/{response_id}", "200"): 1,
            ("", CHAT, "400"): 1,
            ("", CHAT, "404"): 1,
            ("", "other", "404"): 1,
            ("", "/health", "200"): 1,
        }
        assert found["tandem_request_seconds_count", "gen"] == 4
        assert found["tandem_ttft_seconds_count", "gen"] == 1
        assert found["tandem_in_flight_requests", "gen"] == 0
        assert found["tandem_replicas", "gen", "linked"] == 1
        assert found["tandem_link_connects_total", "gen"] == 1
        assert found["tandem_link_bytes_total", "received", "gen"] > 0
