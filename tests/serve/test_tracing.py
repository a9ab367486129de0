"""Spans of router, link, replica and engine, received over OTLP."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from cluster.asgi import ASGIApp, Receive, Scope, Send
from cluster.config import GeneratorConfig, parse
from cluster.config.operations import TracingConfig
from cluster.engines.sim import SimEngine
from cluster.gateway import Gateway, GatewayApp, ReplicaInfo, Wiring
from cluster.link import LinkServer
from cluster.tracing import start_tracer
from cluster.tracing.replica import TracedApp
from tests import asgi, otlp

SECRET = b"s" * 32
CHAT = "/v1/chat/completions"
BODY = {"model": "gen", "messages": [{"role": "user", "content": "a-secret-text"}]}
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SERVER, CLIENT, INTERNAL = 2, 3, 1


@asynccontextmanager
async def traced_pool(
    url: str, engine_app: ASGIApp | None = None, **tracing: Any
) -> AsyncIterator[ASGIApp]:
    """Run a router and a replica of the simulated engine, each with its own tracer."""
    config = TracingConfig(endpoint=url, export_interval_s=0.05, **tracing)
    gen = {"name": "gen", "model": "m", "engine": "sim"}
    router_tracer, replica_tracer = (
        start_tracer(config, "router", "r1"),
        start_tracer(config, "replica", "g1"),
    )
    assert router_tracer is not None
    assert replica_tracer is not None
    engine = SimEngine(GeneratorConfig.model_validate(gen))
    await engine.start()
    routes = engine.routes()
    app = TracedApp(
        engine_app or engine.app,
        replica_tracer,
        "gen",
        "sim",
        lambda path: path if path in routes else None,
    )
    server = LinkServer(app, SECRET)
    host, port = await server.start()
    gateway = Gateway(parse({"generators": [gen]}), {"gen": Wiring(SECRET)}, tracer=router_tracer)
    gateway.pools["gen"].update([ReplicaInfo("gen-1", host, port, routes)])
    try:
        yield GatewayApp(gateway)
    finally:
        await gateway.close()
        await server.stop()
        await engine.stop()
        await router_tracer.close()
        await replica_tracer.close()


async def test_a_request_records_four_spans_of_one_trace() -> None:
    with otlp.collect_spans() as received:
        async with traced_pool(received.url) as app:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "id-1"}
            body = {**BODY, "stream": True, "max_tokens": 5}
            answer = await asgi.post(app, CHAT, body, headers=headers)
            assert answer.status == 200
            spans = await asyncio.to_thread(received.wait, 4)
        assert len(received.spans) == 4
        assert not any(b"a-secret-text" in raw for raw in received.raw)
    assert {span.trace_id for span in spans} == {TRACE}
    assert not any(span.failed for span in spans)
    router = next(span for span in spans if span.parent_id == PARENT)
    link = next(span for span in spans if span.parent_id == router.span_id)
    replica = next(span for span in spans if span.parent_id == link.span_id)
    engine = next(span for span in spans if span.parent_id == replica.span_id)
    assert [(span.service, span.name, span.kind) for span in (router, link, replica, engine)] == [
        ("router", f"POST {CHAT}", SERVER),
        ("router", "link", CLIENT),
        ("replica", f"POST {CHAT}", SERVER),
        ("replica", "chat gen", INTERNAL),
    ]
    assert router.attributes["http.response.status_code"] == 200
    assert router.attributes["tandem.request_id"] == "id-1"
    assert router.attributes["tandem.queue_s"] >= 0
    assert router.attributes["gen_ai.usage.output_tokens"] == 5
    assert link.attributes["tandem.replica"] == "gen-1"
    assert link.attributes["tandem.link.way"] == "linked"
    assert engine.attributes["gen_ai.operation.name"] == "chat"
    assert engine.attributes["gen_ai.provider.name"] == "sim"
    assert engine.attributes["gen_ai.request.model"] == "gen"
    assert engine.attributes["gen_ai.usage.input_tokens"] > 0
    assert engine.attributes["gen_ai.usage.output_tokens"] == 5
    assert engine.attributes["gen_ai.response.time_to_first_chunk"] > 0


async def test_the_engine_receives_its_span_as_traceparent() -> None:
    seen: list[dict[bytes, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope["headers"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    with otlp.collect_spans() as received:
        async with traced_pool(received.url, app) as gateway:
            await asgi.post(gateway, CHAT, BODY)
            spans = await asyncio.to_thread(received.wait, 4)
    engine = next(span for span in spans if span.name == "chat gen")
    traceparent = seen[0][b"traceparent"].decode().split("-")
    assert traceparent[:3] == ["00", engine.trace_id, engine.span_id]
    assert int(traceparent[3], 16) & 1


async def test_an_unsampled_caller_is_respected_and_its_context_passed_on() -> None:
    seen: list[dict[bytes, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope["headers"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    with otlp.collect_spans() as received:
        async with traced_pool(received.url, app) as gateway:
            unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
            await asgi.post(gateway, CHAT, BODY, headers=unsampled)
        assert received.spans == []
    assert seen[0][b"traceparent"].startswith(f"00-{TRACE}-".encode())
    assert seen[0][b"traceparent"].endswith(b"-00")


async def test_ratio_zero_samples_nothing_and_malformed_parents_are_ignored() -> None:
    with otlp.collect_spans() as received:
        async with traced_pool(received.url, sample_ratio=0.0) as app:
            for parent in ("nonsense", f"00-{'0' * 32}-{PARENT}-01"):
                answer = await asgi.post(app, CHAT, BODY, headers={"traceparent": parent})
                assert answer.status == 200
        assert received.spans == []


async def test_failures_are_marked_without_their_message() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("a-secret-text")

    with otlp.collect_spans() as received:
        async with traced_pool(received.url, app) as gateway:
            assert (await asgi.post(gateway, CHAT, BODY)).status == 500
            spans = await asyncio.to_thread(received.wait, 4)
        assert not any(b"a-secret-text" in raw for raw in received.raw)
    assert all(span.failed for span in spans)
    engine = next(span for span in spans if span.name == "chat gen")
    assert engine.attributes["error.type"] == "RuntimeError"


async def test_a_client_disconnect_ends_all_spans() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await asyncio.Future()

    with otlp.collect_spans() as received:
        async with traced_pool(received.url, app) as gateway:
            call = asgi.start(gateway, "POST", CHAT, BODY)
            async with asyncio.timeout(60):
                while not call.answer.status:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            await call.cancel()
            spans = await asyncio.to_thread(received.wait, 4)
    router = next(span for span in spans if not span.parent_id)
    assert router.attributes["http.response.status_code"] == 499


async def test_an_unreachable_collector_does_not_delay_requests() -> None:
    async with asyncio.timeout(60), traced_pool("http://127.0.0.1:9/v1/traces") as app:
        answer = await asgi.post(app, CHAT, BODY)
        assert answer.status == 200


def test_opentelemetry_is_not_imported_without_tracing() -> None:
    code = """
import asyncio, sys
from cluster.config import parse
from cluster.gateway import Gateway, Wiring
from cluster.tracing import start_tracer
async def make():
    Gateway(parse({"generators": [{"name": "a", "model": "m"}]}), {"a": Wiring(b"s")})
asyncio.run(make())
assert start_tracer(None, "a", "b") is None
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
