"""The gateway over real links, with small applications in the replicas' place."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.asgi import Message, Receive, Scope, Send
from cluster.config import parse
from cluster.gateway import Gateway, GatewayApp, Opener, ReplicaInfo, Wiring
from cluster.gateway.reporting.dashboard import ReadDecisions
from cluster.key_file import KeyFile
from cluster.link import LinkServer, ResponseHead
from cluster.usage import Usage
from tests import asgi

SECRET = b"s" * 32
CHAT = "/v1/chat/completions"
REQUESTS_TOTAL = "tandem_requests_total"
ROUTES = (CHAT, "/v1/embeddings", "/v1/models", "/openapi.json", "/v1/responses/{response_id}")


class Replica:
    """An application that says what it was asked, streams, waits or dies, as the body wants."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[Scope] = []
        self.cancelled = 0
        self.gate = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope)
        body = await _whole(receive)
        asked: dict[str, Any] = json.loads(body) if body else {}
        try:
            if asked.get("wait_before"):
                await self.gate.wait()
            if asked.get("fail"):
                raise RuntimeError("secret internals")
            await self._answer(scope, asked, len(body), send)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _answer(self, scope: Scope, asked: dict[str, Any], size: int, send: Send) -> None:
        kind = b"text/event-stream" if asked.get("stream") else b"application/json"
        headers = [(b"content-type", kind), (b"x-engine", self.name.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for index in range(asked.get("stream", 0)):
            event = f"data: {index}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if asked.get("wait_after"):
            await self.gate.wait()
        last = json.dumps({"replica": self.name, "path": scope["path"], "size": size}).encode()
        if scope["path"] == "/v1/models":
            last = json.dumps({"data": [{"id": self.name.split("-")[0]}]}).encode()
        if scope["path"] == "/openapi.json":
            last = json.dumps({"paths": {CHAT: {"post": {}}}}).encode()
        await send({"type": "http.response.body", "body": b"" if asked.get("stream") else last})


async def _whole(receive: Receive) -> bytes:
    chunks = []
    while True:
        message: Message = await receive()
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks)


class World:
    """A gateway, and replicas that can be added and taken out."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.app = GatewayApp(gateway)
        self.servers: dict[str, LinkServer] = {}
        self.running: dict[str, dict[str, ReplicaInfo]] = {name: {} for name in gateway.pools}

    async def add(
        self, pool: str, name: str, routes: tuple[str, ...] = ROUTES, ready: int | None = None
    ) -> Replica:
        replica = Replica(name)
        server = LinkServer(replica, SECRET)
        host, port = await server.start()
        self.servers[name] = server
        self.running[pool][name] = ReplicaInfo(name, host, port, routes, {"engine": "1"})
        self.update(pool)
        wanted = len(self.running[pool]) if ready is None else ready
        await self.until(lambda: self.gateway.pools[pool].replicas.num_ready == wanted)
        return replica

    def take_out(self, pool: str, name: str) -> None:
        del self.running[pool][name]
        self.update(pool)

    def update(self, pool: str) -> None:
        self.gateway.pools[pool].update(self.running[pool].values())

    @staticmethod
    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)


class Beside:
    """A way to a replica that needs no link: answers with the replica's id."""

    usage = Usage(3, 1, 2)

    def __init__(self, replica_id: str) -> None:
        self._left = [replica_id.encode()]

    async def head(self) -> ResponseHead:
        return ResponseHead(200, [(b"content-type", b"text/plain")])

    async def read(self) -> bytes:
        return self._left.pop() if self._left else b""

    def cancel(self) -> None:
        self._left.clear()


def fallback(replica_id: str) -> Opener:
    return lambda head, body: Beside(replica_id)


@asynccontextmanager
async def a_world(
    key_file: KeyFile | None = None,
    may_sleep: bool = False,
    read_decisions: ReadDecisions | None = None,
    routing: str = "prefix",
    **router: Any,
) -> AsyncIterator[World]:
    generator: dict[str, Any] = {
        "name": "gen",
        "model": "m",
        "max_in_flight": 2,
        "routing": routing,
    }
    if may_sleep:
        generator["replicas"] = {"min": 0, "target_in_flight": 2}
    config = parse(
        {
            "generators": [generator],
            "classifiers": [{"name": "cls", "model": "m"}],
            "router": router,
        }
    )
    wirings = {name: Wiring(SECRET, fallback=fallback) for name in ("gen", "cls")}
    gateway = Gateway(config, wirings, {"tandem": "0"}, key_file, read_decisions=read_decisions)
    world = World(gateway)
    try:
        yield world
    finally:
        await world.gateway.close()
        for server in world.servers.values():
            await server.stop()


async def test_a_session_stays_at_its_replica_by_header_and_by_user() -> None:
    async with a_world(routing="session") as world:
        names = [f"gen-{number}" for number in range(4)]
        for name in names:
            await world.add("gen", name)

        async def replica_of(user: str | None = None, **headers: str) -> str:
            body = {"model": "gen", "messages": [{"role": "user", "content": "Hi"}], "user": user}
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            answer = await asgi.post(world.app, CHAT, body, headers=sent)
            return str(answer.json()["replica"])

        sessions = [str(number) for number in range(24)]
        homes = {each: await replica_of(x_session_id=each) for each in sessions}
        assert set(homes.values()) == set(names)
        for each in sessions:
            assert await replica_of(user=each) == homes[each]
            assert await replica_of(user="0", x_session_id=each) == homes[each]
        world.take_out("gen", "gen-0")
        for each in sessions:
            now = await replica_of(x_session_id=each)
            assert now != "gen-0" if homes[each] == "gen-0" else now == homes[each]


async def test_a_request_is_relayed_and_its_answer_untouched() -> None:
    async with a_world() as world:
        replica = await world.add("gen", "gen-1")
        answer = await asgi.post(
            world.app,
            CHAT,
            {"model": "gen"},
            headers={"x-request-id": "abc", "authorization": "Bearer k", "x-extra": "1"},
        )
        assert answer.status == 200
        assert answer.json() == {"replica": "gen-1", "path": CHAT, "size": 16}
        assert answer.headers["x-request-id"] == "abc"
        assert answer.headers["x-engine"] == "gen-1"
        sent = dict(replica.seen[0]["headers"])
        assert sent[b"x-request-id"] == b"abc"
        assert sent[b"x-extra"] == b"1"
        assert b"authorization" not in sent


async def test_a_request_id_is_made_where_none_is_given_and_a_bad_one_refused() -> None:
    async with a_world() as world:
        await world.add("gen", "gen-1")
        assert len((await asgi.post(world.app, CHAT, {})).headers["x-request-id"]) == 32
        for bad in ("a" * 500, "a\tb", "\x7f"):
            answer = await asgi.post(world.app, CHAT, {}, headers={"x-request-id": bad})
            assert answer.status == 400
            assert answer.json()["error"]["param"] == "x-request-id"


async def test_the_model_chooses_the_pool() -> None:
    async with a_world() as world:
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
    async with a_world(max_body_bytes=1024) as world:
        await world.add("gen", "gen-1")
        await world.add("cls", "cls-1", ("/classify",))
        answer = await asgi.post(world.app, path, body)
        assert answer.status == status
        error = answer.json()["error"]
        assert says in error["message"]
        assert error["code"] == status
        assert set(error) == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"]


async def test_keys() -> None:
    digest = hashlib.sha256(b"right").hexdigest()
    async with a_world(api_keys_sha256=[digest]) as world:
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


async def test_a_replica_learns_who_asks_from_the_router_alone() -> None:
    digest = hashlib.sha256(b"right").hexdigest()
    for keys, tenant in (([digest], digest[:16].encode()), ([], None)):
        async with a_world(api_keys_sha256=keys) as world:
            replica = await world.add("gen", "gen-1")
            headers = {"x-api-key": "right", "x-tandem-tenant": "someone else"}
            await asgi.post(world.app, CHAT, {}, headers=headers)
            seen = dict(replica.seen[0]["headers"])
            assert seen.get(b"x-tandem-tenant") == tenant
            assert b"x-api-key" not in seen


async def test_a_stream_comes_through_whole_and_in_order() -> None:
    async with a_world() as world:
        await world.add("gen", "gen-1")
        answer = await asgi.post(world.app, CHAT, {"stream": 5000})
        assert [int(data) for _, data in answer.events()] == list(range(5000))
        assert answer.headers["content-type"] == "text/event-stream"


async def test_a_client_that_leaves_cancels_its_work_and_frees_its_place() -> None:
    async with a_world() as world:
        replica = await world.add("gen", "gen-1")
        call = asgi.start(world.app, "POST", CHAT, {"stream": 3, "wait_after": True})
        await call.chunks(1)
        await call.cancel()
        await world.until(lambda: replica.cancelled == 1)
        assert world.gateway.pools["gen"].replicas.running[0].in_flight == 0


async def test_requests_beyond_capacity_wait_in_order_and_the_queue_is_bounded() -> None:
    async with a_world(max_queued=2) as world:
        replica = await world.add("gen", "gen-1")
        pool = world.gateway.pools["gen"]
        calls = [asgi.start(world.app, "POST", CHAT, {"wait_before": True}) for _ in range(4)]
        await world.until(lambda: pool.num_queued == 2)
        refused = await asgi.post(world.app, CHAT, {})
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        replica.gate.set()
        assert [(await call.done()).status for call in calls] == [200] * 4
        assert len(replica.seen) == 4


async def test_a_queued_client_that_leaves_gives_up_its_place() -> None:
    async with a_world() as world:
        replica = await world.add("gen", "gen-1")
        pool = world.gateway.pools["gen"]
        calls = [asgi.start(world.app, "POST", CHAT, {"wait_before": True}) for _ in range(3)]
        await world.until(lambda: pool.num_queued == 1)
        await calls[2].cancel()
        assert pool.num_queued == 0
        replica.gate.set()
        for call in calls[:2]:
            await call.done()
        assert (await asgi.post(world.app, CHAT, {})).status == 200
        assert pool.replicas.running[0].in_flight == 0


async def test_with_no_replica_a_request_waits_for_one_then_fails() -> None:
    async with a_world(queue_timeout_s=0.2) as world:
        answer = await asgi.post(world.app, CHAT, {"model": "gen"})
        assert answer.status == 503
        assert "no replica" in answer.json()["error"]["message"]
    async with a_world() as world:
        call = asgi.start(world.app, "POST", CHAT, {"model": "gen"})
        await world.until(lambda: world.gateway.pools["gen"].num_queued == 1)
        await world.add("gen", "gen-1")
        assert (await call.done()).status == 200


async def test_a_pool_without_replicas_is_ready_and_holds_requests_for_the_first() -> None:
    async with a_world(may_sleep=True, queue_timeout_s=0.05, start_timeout_s=30) as world:
        await world.add("cls", "cls-1")
        assert (await asgi.get(world.app, "/ready")).status == 200
        assert (await asgi.get(world.app, "/v1/models")).status == 200
        assert (await asgi.get(world.app, "/openapi.json")).status == 200
        assert world.gateway.pools["gen"].meter.arrivals.value == 0  # nothing woke it
        call = asgi.start(world.app, "POST", CHAT, {"model": "gen"})
        await asyncio.sleep(0.1)  # longer than the wait in a pool that has replicas
        assert world.gateway.load_report(0.0, 0.0)["gen/queued"] == 1
        await world.add("gen", "gen-1")
        assert (await call.done()).status == 200


@pytest.mark.parametrize("how", ["lost", "unavailable"])
async def test_a_lost_replica_is_replaced_by_another_while_nothing_was_answered(how: str) -> None:
    async with a_world() as world:
        await world.add("gen", "gen-1")
        call = asgi.start(world.app, "POST", CHAT, {"wait_before": True})
        await world.until(lambda: world.servers["gen-1"].num_streams == 1)
        other = await world.add("gen", "gen-2")
        other.gate.set()
        if how == "lost":
            await world.gateway.pools["gen"].replicas.running[0].link.close()
        else:
            await world.servers["gen-1"].stop()
        answer = await call.done()
        assert answer.status == 200
        assert answer.json()["replica"] == "gen-2"
        assert await handovers(world) == {how: 1}


async def test_a_stream_that_is_cut_off_ends_with_an_error_event() -> None:
    async with a_world() as world:
        await world.add("gen", "gen-1")
        call = asgi.start(world.app, "POST", CHAT, {"stream": 2, "wait_after": True})
        await call.chunks(1)
        await world.servers["gen-1"].stop()
        answer = await call.done()
        assert answer.data()[-1]["error"]["code"] == 503


async def test_an_application_that_breaks_shows_no_internals() -> None:
    async with a_world() as world:
        await world.add("gen", "gen-1")
        answer = await asgi.post(world.app, CHAT, {"fail": True})
        assert answer.status == 500
        assert "secret" not in answer.body.decode()
        assert answer.json()["error"]["code"] == 500


async def test_a_replicas_traceback_is_found_by_the_requests_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with a_world() as world:
        await world.add("gen", "gen-1")
        headers = {"x-request-id": "6b3f2f52"}
        await asgi.post(world.app, CHAT, {"fail": True}, headers=headers)
    (record,) = [record for record in caplog.records if record.exc_info]
    assert "6b3f2f52" in record.message


async def test_a_replica_that_is_taken_out_finishes_what_it_has() -> None:
    async with a_world() as world:
        old = await world.add("gen", "gen-1")
        call = asgi.start(world.app, "POST", CHAT, {"wait_before": True})
        await world.until(lambda: len(old.seen) == 1)
        world.take_out("gen", "gen-1")
        new = await world.add("gen", "gen-2")
        assert (await asgi.post(world.app, CHAT, {})).json()["replica"] == "gen-2"
        old.gate.set()
        assert (await call.done()).json()["replica"] == "gen-1"
        assert len(old.seen) == len(new.seen) == 1
        assert await handovers(world) == {"drained": 1}


async def test_a_replica_that_retires_finishes_what_it_has_and_refuses_the_rest() -> None:
    async with a_world() as world:
        old = await world.add("gen", "gen-1")
        call = asgi.start(world.app, "POST", CHAT, {"wait_before": True})
        await world.until(lambda: len(old.seen) == 1)
        late = asgi.start(world.app, "POST", CHAT, {})
        while world.gateway.pools["gen"].num_in_flight < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        world.servers["gen-1"].retire()  # the request is on its way, and was not read yet
        await world.add("gen", "gen-2", ready=1)
        old.gate.set()
        assert (await call.done()).json()["replica"] == "gen-1"
        assert (await late.done()).json()["replica"] == "gen-2"
        assert await handovers(world) == {"refused": 1, "drained": 1}


async def test_load_is_spread() -> None:
    async with a_world() as world:
        first = await world.add("gen", "gen-1")
        second = await world.add("gen", "gen-2")
        calls = [asgi.start(world.app, "POST", CHAT, {"wait_before": True}) for _ in range(4)]
        await world.until(lambda: len(first.seen) + len(second.seen) == 4)
        assert (len(first.seen), len(second.seen)) == (2, 2)
        first.gate.set()
        second.gate.set()
        for call in calls:
            await call.done()


async def test_own_paths() -> None:
    async with a_world() as world:
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
        assert (await asgi.get(world.app, "/version")).json() == {"tandem": "0", "engine": "1"}
        paths = (await asgi.get(world.app, "/openapi.json")).json()["paths"]
        assert {CHAT, "/health"} <= paths.keys()
        head = await asgi.call(world.app, "HEAD", "/health")
        assert (head.status, head.body) == (200, b"")


async def test_path_templates() -> None:
    async with a_world() as world:
        await world.add("gen", "gen-1")
        answer = await asgi.get(world.app, "/v1/responses/resp_1")
        assert answer.json()["path"] == "/v1/responses/resp_1"


async def test_large_bodies_do_not_hold_up_others() -> None:
    async with a_world() as world:
        await world.add("gen", "gen-1")
        large = asgi.start(world.app, "POST", CHAT, {"text": "x" * 10_000_000})
        small = asgi.start(world.app, "POST", CHAT, {"stream": 100})
        await small.done()
        assert (await large.done()).json()["size"] > 10_000_000


async def test_nothing_is_left_behind() -> None:
    async with a_world() as world:
        await world.add("gen", "gen-1")
        await asgi.post(world.app, CHAT, {"stream": 10})
    with suppress(TimeoutError):
        await World.until(lambda: len(asyncio.all_tasks()) == 1)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_place_that_another_router_frees_goes_to_the_one_who_waits() -> None:
    """Two routers share a replica: its report of its load must wake the queue."""
    async with a_world(queue_timeout_s=20) as world, a_world(queue_timeout_s=20) as other:
        replica = await world.add("gen", "gen-1")
        other.running["gen"] = world.running["gen"]
        other.update("gen")
        await other.until(lambda: other.gateway.pools["gen"].replicas.num_ready == 1)
        calls = [asgi.start(world.app, "POST", CHAT, {"wait_before": True}) for _ in range(2)]
        await world.until(lambda: len(replica.seen) == 2)
        await other.until(lambda: other.gateway.pools["gen"].replicas.fleet.in_flight("gen-1") == 2)
        waiting = asgi.start(other.app, "POST", CHAT, {})
        await other.until(lambda: other.gateway.pools["gen"].num_queued == 1)
        replica.gate.set()
        for call in [*calls, waiting]:
            assert (await call.done()).status == 200


async def test_clients_that_gave_up_leave_nothing_in_the_queue() -> None:
    async with a_world(max_queued=4) as world:
        for _ in range(20):
            call = asgi.start(world.app, "POST", CHAT, {"model": "gen"})
            await asyncio.sleep(0)
            await call.cancel()
        assert world.gateway.pools["gen"].num_queued == 0


async def test_closing_ends_what_waits_and_what_runs() -> None:
    async with a_world() as world:
        replica = await world.add("gen", "gen-1")
        running = [asgi.start(world.app, "POST", CHAT, {"wait_before": True}) for _ in range(2)]
        await world.until(lambda: len(replica.seen) == 2)
        waiting = asgi.start(world.app, "POST", CHAT, {})
        await world.until(lambda: world.gateway.pools["gen"].num_queued == 1)
        await world.gateway.close()
        for call in [*running, waiting]:
            assert (await call.done()).status == 503


async def test_a_path_prefix_is_taken_off() -> None:
    async with a_world() as world:
        messages: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b""}

        async def send(message: Message) -> None:
            messages.append(message)

        scope = {"type": "http", "method": "GET", "headers": [], "query_string": b""}
        await world.app({**scope, "path": "/llm/health", "root_path": "/llm"}, receive, send)
        assert messages[0]["status"] == 200


async def test_a_key_is_asked_for_before_the_body_is_read() -> None:
    async with a_world(api_keys_sha256=[hashlib.sha256(b"k").hexdigest()]) as world:
        answer = await asgi.post(world.app, CHAT, b"x" * 10_000_000)
        assert answer.status == 401
        assert answer.headers["connection"] == "close"


async def test_a_replica_without_a_link_is_asked_beside_it() -> None:
    async with a_world(queue_timeout_s=5) as world:
        world.running["gen"]["gen-1"] = ReplicaInfo("gen-1", "127.0.0.1", 1, ROUTES)
        world.update("gen")
        answer = await asgi.post(world.app, CHAT, {})
        assert (answer.status, answer.body) == (200, b"gen-1")
        assert (await metrics(world))["tandem_link_fallbacks_total", "gen"] == 1
        await world.gateway.pools["gen"].replicas.running[0].link.close()  # it was no replica
        del world.running["gen"]["gen-1"]
        await world.add("gen", "gen-2")
        answer = await asgi.post(world.app, CHAT, {})
        assert answer.json()["replica"] == "gen-2"
        assert (await metrics(world))["tandem_link_fallbacks_total", "gen"] == 1


async def metrics(world: World) -> dict[tuple[str, ...], float]:
    answer = await asgi.get(world.app, "/metrics")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


async def test_objectives_are_shown_where_there_are_any() -> None:
    async with a_world() as world:
        found = {
            key[1:]: value
            for key, value in (await metrics(world)).items()
            if key[0] == "tandem_objective_seconds"
        }
    assert found == {
        ("gen", "ttft_p90"): 2.5,  # of 2 s and 0.2 s: the bounds above them
        ("gen", "itl_p90"): 0.25,
        ("cls", "latency_p95"): 0.5,
    }


async def test_requests_that_are_served_are_shown_with_their_tokens() -> None:
    async with a_world() as world:
        replica = await world.add("gen", "gen-1")
        call = asgi.start(world.app, "POST", CHAT, {"wait_before": True})
        await world.until(lambda: len(replica.seen) == 1)
        served = await metrics(world)
        assert served["tandem_in_flight_requests", "gen"] == 1
        assert served["tandem_in_flight_tokens", "gen"] > 0
        await call.cancel()
        assert (await metrics(world))["tandem_in_flight_tokens", "gen"] == 0


async def handovers(world: World) -> dict[str, float]:
    """Those that there were, by their reason."""
    found = await metrics(world)
    return {k[2]: n for k, n in found.items() if k[0] == "tandem_failovers_total" and n}


async def test_every_request_is_counted_once() -> None:
    async with a_world() as world:
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
        found = await metrics(world)
        requests = {key[1:]: value for key, value in found.items() if key[0] == REQUESTS_TOTAL}
        assert requests == {
            ("gen", CHAT, "200"): 1,
            ("gen", CHAT, "499"): 1,
            ("gen", CHAT, "500"): 1,
            ("gen", "/v1/responses/{response_id}", "200"): 1,
            ("", "other", "400"): 1,
            ("", "other", "404"): 2,
            ("", "/health", "200"): 1,
        }
        assert found["tandem_request_seconds_count", "gen"] == 4
        assert found["tandem_ttft_seconds_count", "gen"] == 1
        assert found["tandem_in_flight_requests", "gen"] == 0
        assert found["tandem_replicas", "gen", "linked"] == 1
        assert found["tandem_link_connects_total", "gen"] == 1
        assert found["tandem_link_bytes_total", "received", "gen"] > 0
