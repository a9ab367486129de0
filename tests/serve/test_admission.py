"""Admission over real links: keys, quotas, priorities, deadlines, several routers."""

import asyncio
import json
import os
import threading
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.admission.keys import digest
from cluster.gateway import GatewayApp, QuotaSync, ReplicaInfo, RouterLinks
from cluster.gateway.messages import KEPT_BODY_BYTES, Request, with_json_fields
from cluster.key_file import KeyFile
from cluster.link import LinkServer
from tests import asgi
from tests.serve.gateway_kit import CHAT, SECRET, World, gateway_world, metrics


class Keys:
    """Key file in which each key is its tenant's name."""

    def __init__(self, path: Path) -> None:
        self.path, self._time = path, 1
        self.file = KeyFile(path, expected=True)

    def write(self, **tenants: dict[str, Any]) -> None:
        of_key = ("priority", "models")
        keys = [
            {"sha256": digest(name), "tenant": name, **{k: t[k] for k in of_key if k in t}}
            for name, t in tenants.items()
        ]
        limits = {n: {k: v for k, v in t.items() if k not in of_key} for n, t in tenants.items()}
        self.path.write_text(json.dumps({"tenants": limits, "keys": keys}))
        self._time += 1
        os.utime(self.path, ns=(self._time * 10**9, self._time * 10**9))


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.yaml")


def ask(world: World, tenant: str, body: Any = None, **headers: str) -> asgi.Call:
    sent = {"x-api-key": tenant, **{name.replace("_", "-"): v for name, v in headers.items()}}
    return asgi.start(world.app, "POST", CHAT, {"model": "gen", **(body or {})}, headers=sent)


async def test_key_must_allow_the_model(keys: Keys) -> None:
    keys.write(a={"models": ["cls"]}, b={})
    async with gateway_world(keys.file) as world:
        await world.add("gen", "gen-1")
        await world.add("cls", "cls-1", ("/classify",))
        answer = await ask(world, "a").done()
        assert answer.status == 403
        assert answer.json()["error"]["type"] == "PermissionDeniedError"
        assert (await ask(world, "b").done()).status == 200
        listed = await asgi.get(world.app, "/v1/models", headers={"x-api-key": "a"})
        assert [card["id"] for card in listed.json()["data"]] == ["cls"]
        found = await metrics_inside(world)
        assert found["tandem_requests_total", "gen", CHAT, "403"] == 1


async def test_quota_errors_name_the_quota_and_quotas_change_at_run_time(keys: Keys) -> None:
    keys.write(a={"max_concurrent": 1}, b={"requests_per_minute": 6})
    async with gateway_world(keys.file) as world:
        replica = await world.add("gen", "gen-1")
        running = ask(world, "a", {"wait_before": True})
        await world.until(lambda: len(replica.seen) == 1)
        refused = await ask(world, "a").done()
        assert refused.status == 429
        assert "1 concurrent requests" in refused.json()["error"]["message"]
        keys.write(a={"max_concurrent": 2}, b={"requests_per_minute": 6})
        await world.gateway.admission.refresh_keys()
        assert (await ask(world, "a").done()).status == 200
        replica.gate.set()
        assert (await running.done()).status == 200
        assert (await ask(world, "b").done()).status == 200
        refused = await ask(world, "b").done()
        assert (refused.status, refused.headers["retry-after"]) == (429, "10")
        found = await metrics_inside(world)
        assert found["tandem_limits_hit_total", "max_concurrent", "a"] == 1
        assert found["tandem_limits_hit_total", "requests_per_minute", "b"] == 1
        assert found["tandem_tenant_requests_total", "200", "a"] == 2
        assert found["tandem_tenant_requests_total", "429", "a"] == 1


async def test_daily_budget_lasts_until_midnight(keys: Keys) -> None:
    keys.write(a={"tokens_per_day": 5})
    async with gateway_world(keys.file) as world:
        await world.add("gen", "gen-1")
        first = await ask(world, "a", {"prompt": "a long prompt " * 40}).done()
        assert first.status == 200  # one request may overdraw the budget
        refused = await ask(world, "a").done()
        assert refused.status == 429
        assert "5 tokens per day" in refused.json()["error"]["message"]
        until_midnight_s = 86400 - time.time() % 86400
        assert int(refused.headers["retry-after"]) == pytest.approx(until_midnight_s, abs=60)


async def test_changed_keys_apply_at_the_next_settlement(keys: Keys) -> None:
    keys.write(a={})
    async with gateway_world(keys.file) as world:
        await world.add("gen", "gen-1")
        peers = QuotaSync(world.gateway.admission, world.gateway.pools, RouterLinks("r0", SECRET))
        keys.write(b={})
        await peers.settle()
        assert [(await ask(world, name).done()).status for name in "ab"] == [401, 200]
        await peers.close()


async def test_a_key_file_on_a_hung_disk_blocks_neither_requests_nor_quotas(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.yaml")
    keys.write(a={})
    async with gateway_world(keys.file) as world:
        await world.add("gen", "gen-1")
        peers = QuotaSync(world.gateway.admission, world.gateway.pools, RouterLinks("r0", SECRET))
        keys.path.unlink()
        os.mkfifo(keys.path)  # a read hangs until someone writes
        async with asyncio.timeout(60):
            for _ in range(3):
                await peers.settle()
                assert (await ask(world, "a").done()).status == 200
        assert [t.name for t in threading.enumerate()].count("tandem-keys") == 1
        entry = {"sha256": digest("b"), "tenant": "b"}
        await asyncio.to_thread(keys.path.write_text, json.dumps({"keys": [entry]}))
        async with asyncio.timeout(60):
            while (await ask(world, "b").done()).status != 200:
                await peers.settle()
        assert (await ask(world, "a").done()).status == 401
        await peers.close()


async def metrics_inside(world: World) -> dict[tuple[str, ...], float]:
    inside = World.__new__(World)
    inside.app = GatewayApp(world.gateway, authenticates=False)
    return await metrics(inside)


async def test_keys_are_added_and_revoked_at_run_time(keys: Keys) -> None:
    keys.write(a={})
    async with gateway_world(keys.file) as world:
        replica = await world.add("gen", "gen-1")
        running = ask(world, "a", {"wait_before": True})
        await world.until(lambda: len(replica.seen) == 1)
        assert (await ask(world, "b").done()).status == 401
        keys.write(b={})
        await world.gateway.admission.refresh_keys()
        assert (await ask(world, "a").done()).status == 401
        assert (await ask(world, "b").done()).status == 200
        replica.gate.set()
        assert (await running.done()).status == 200  # it was admitted before the key was revoked


async def served_order(world: World, replica: Any, calls: dict[str, asgi.Call]) -> list[str]:
    replica.gate.set()
    for call in calls.values():
        assert (await call.done()).status == 200
    seen = [dict(scope["headers"])[b"x-request-id"].decode() for scope in replica.seen]
    return [name for name in seen if name in calls]


async def test_higher_priority_goes_first_up_to_the_keys_limit(keys: Keys) -> None:
    keys.write(a={"priority": 2}, b={}, zero={"weight": 0, "priority": 8})
    async with gateway_world(keys.file) as world:
        replica = await world.add("gen", "gen-1")
        busy = [ask(world, "b", {"wait_before": True}) for _ in range(2)]
        await world.until(lambda: len(replica.seen) == 2)
        asked = {
            "background": ("zero", {}),
            "batch": ("a", {"x_tandem_priority": "-3"}),
            "usual": ("b", {"x_tandem_priority": "7"}),
            "urgent": ("a", {}),
        }
        calls = {}
        for number, (name, (tenant, headers)) in enumerate(asked.items(), 1):
            calls[name] = ask(world, tenant, x_request_id=name, **headers)
            await world.until(lambda n=number: world.gateway.pools["gen"].num_queued == n)
        order = await served_order(world, replica, calls)
        assert order == ["urgent", "usual", "batch", "background"]
        for call in busy:
            await call.done()


@pytest.mark.parametrize("header", ["x-request-timeout-seconds", "x-tandem-priority"])
async def test_error_names_the_invalid_header(header: str) -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        for wrong in ("soon", "nan", "-inf"):
            answer = await asgi.post(world.app, CHAT, {}, headers={header: wrong})
            assert (answer.status, answer.json()["error"]["param"]) == (400, header)


async def test_hopeless_deadline_is_refused_at_once() -> None:
    async with gateway_world() as world:
        replica = await world.add("gen", "gen-1")
        pool = world.gateway.pools["gen"]
        for _ in range(2):  # requests take about 100 ms
            call = ask(world, "", {"wait_before": True, "prompt_tokens": 20})
            await asyncio.sleep(0.1)
            replica.gate.set()
            await call.done()
            replica.gate.clear()
        running = [ask(world, "", {"wait_before": True}) for _ in range(2)]
        await world.until(lambda: pool.replicas.running[0].in_flight == 2)
        waiting = [ask(world, "", {"wait_before": True}) for _ in range(20)]
        await world.until(lambda: pool.num_queued == 20)
        # Ten requests of 100 ms are before it. Nothing ends, so it would get 408 if it waited.
        refused = await ask(world, "", x_request_timeout_seconds="0.5").done()
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        replica.gate.set()
        for call in [*running, *waiting]:
            assert (await call.done()).status == 200
        found = await metrics(world)
        assert found["tandem_shed_requests_total", "gen", "deadline"] == 1


async def test_deadline_ends_the_wait_in_the_queue() -> None:
    async with gateway_world() as world:
        replica = await world.add("gen", "gen-1")
        pool = world.gateway.pools["gen"]
        running = [ask(world, "", {"wait_before": True}) for _ in range(2)]
        await world.until(lambda: pool.replicas.running[0].in_flight == 2)
        late = await ask(world, "", x_request_timeout_seconds="0.1").done()
        assert late.status == 429
        assert len(pool.queue) == 0
        replica.gate.set()
        for call in running:
            assert (await call.done()).status == 200
        found = await metrics(world)
        assert found["tandem_shed_requests_total", "gen", "expired"] == 1


async def test_nothing_is_refused_by_estimate_without_a_replica() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        for _ in range(3):
            assert (await ask(world, "").done()).status == 200
        world.remove("gen", "gen-1")
        calls = [ask(world, "", x_request_timeout_seconds="5") for _ in range(50)]
        await world.until(lambda: world.gateway.pools["gen"].num_queued == 50)
        await world.add("gen", "gen-2")
        for call in calls:
            assert (await call.done()).status == 200


async def test_requests_that_never_fit_are_rejected_at_once() -> None:
    async with gateway_world(max_queued_tokens=1000) as world:
        replica = await world.add("gen", "gen-1", (CHAT, "/v1/completions"))
        world.running["gen"]["gen-1"] = replace(world.running["gen"]["gen-1"], context_tokens=50)
        world.update("gen")
        body = {"model": "gen", "prompt": list(range(51))}
        answer = await asgi.post(world.app, "/v1/completions", body)
        assert (answer.status, answer.json()["error"]["param"]) == (400, "prompt")
        assert "context of 50 tokens" in answer.json()["error"]["message"]
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        text = {"model": "gen", "messages": [{"role": "user", "content": "a" * 10_000}]}
        assert (await asgi.post(world.app, CHAT, text)).status == 400
        answer = await asgi.post(world.app, CHAT, {"model": "gen", "messages": [], "n": 500})
        assert answer.status == 413
        assert "1000 (router.max_queued_tokens)" in answer.json()["error"]["message"]
        assert not replica.seen


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [], "n": 16384}, "n"),
        ("/v1/completions", {"prompt": ["a"] * 1025}, None),
        ("/v1/completions", {"prompt": ["a"] * 33, "n": 32}, None),
    ],
)
async def test_fan_out_of_a_request_is_limited(path: str, body: Any, param: str | None) -> None:
    async with gateway_world() as world:
        replica = await world.add("gen", "gen-1", (CHAT, "/v1/completions"))
        answer = await asgi.post(world.app, path, {"model": "gen", **body})
        error = answer.json()["error"]
        assert (answer.status, error["type"], error["param"]) == (400, "BadRequestError", param)
        assert "the limit is 1024 (router.max_sequences_per_request)" in error["message"]
        assert not replica.seen


async def test_queued_tokens_are_bounded() -> None:
    async with gateway_world(max_queued_tokens=1000) as world:
        replica = await world.add("gen", "gen-1")
        pool = world.gateway.pools["gen"]
        running = [ask(world, "", {"wait_before": True, "max_tokens": 1}) for _ in range(2)]
        await world.until(lambda: pool.replicas.running[0].in_flight == 2)
        calls = [ask(world, "", {"max_tokens": 100}) for _ in range(40)]
        statuses: Counter[int] = Counter()
        await world.until(lambda: sum(c.answer.ended for c in calls) + pool.num_queued == 40)
        assert 0 < pool.num_queued < 10
        assert pool.queue.queued_tokens <= 1000
        replica.gate.set()
        for call in [*running, *calls]:
            statuses[(await call.done()).status] += 1
        assert statuses.keys() == {200, 429}


@pytest.mark.parametrize(
    ("body", "priority", "sent"),
    [
        (b"{}", 2, {"priority": -2}),
        (b' {"a": {} } \n', 1, {"a": {}, "priority": -1}),
        (b'{"priority": -99}', 0, {"priority": 0}),
    ],
)
def test_body_gets_the_priority_for_vllm(body: bytes, priority: int, sent: Any) -> None:
    request = Request("i", "POST", CHAT, b"", [(b"content-length", b"9"), (b"x", b"y")], body)
    result = with_json_fields(request, {"priority": -priority})
    assert json.loads(result.body) == sent
    assert dict(result.headers) == {b"content-length": str(len(result.body)).encode(), b"x": b"y"}
    form = Request("i", "POST", CHAT, b"", [], b"a=b")
    assert with_json_fields(form, {"priority": -priority}) is form


async def test_a_body_that_gets_fields_is_kept_once() -> None:
    async with gateway_world() as world:
        replica = await world.add("gen", "gen-1")
        body = json.dumps({"x": "x" * 100_000, "priority": 1, "wait_before": True}).encode()
        request = Request("i", "POST", CHAT, b"", [], body)
        answer = asyncio.create_task(world.gateway.respond(request))
        await world.until(lambda: bool(replica.bodies))
        assert json.loads(replica.bodies[0])["priority"] == 0
        assert len(request.body) == KEPT_BODY_BYTES
        replica.gate.set()
        response = await answer
        assert response.status == 200
        await response.body.aclose()


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/score", "/v1/chat/completions/batch"])
@pytest.mark.parametrize("content_type", ["application/json", "application/unknown"])
async def test_no_client_value_reaches_the_scheduler(
    keys: Keys, path: str, content_type: str
) -> None:
    keys.write(a={"priority": 2})
    async with gateway_world(keys.file) as world:
        replica = await world.add("gen", "gen-1", (path,))
        headers = {"x-api-key": "a", "content-type": content_type}
        unsafe = {"x-vllm-priority": "-99", "x-data-parallel-rank": "1", "x-tandem-tenant": "b"}
        body = {"priority": -99, "messages": []}
        answer = await asgi.post(world.app, path, body, headers=headers | unsafe)
        assert answer.status == 200
        sent = dict(replica.seen[0]["headers"])
        assert sent[b"x-vllm-priority"] == b"-2"
        assert sent[b"x-tandem-tenant"] == b"a"
        assert b"x-data-parallel-rank" not in sent
        assert json.loads(replica.bodies[0])["priority"] == -2


async def test_quotas_and_shares_hold_over_several_routers(keys: Keys) -> None:
    keys.write(a={"requests_per_minute": 60}, b={})
    async with AsyncExitStack() as stack:
        worlds, peers, all_links, infos = [], [], [], []
        for number in range(3):
            world = await stack.enter_async_context(
                gateway_world(KeyFile(keys.path, expected=True))
            )
            links = RouterLinks(f"r{number}", SECRET)
            peer = QuotaSync(world.gateway.admission, world.gateway.pools, links)
            stack.push_async_callback(links.close)
            stack.push_async_callback(peer.close)
            server = LinkServer(peer.wrap(GatewayApp(world.gateway, authenticates=False)), SECRET)
            host, port = await server.start()
            stack.push_async_callback(server.stop)
            infos.append(ReplicaInfo(f"r{number}", host, port))
            worlds.append(world)
            peers.append(peer)
            all_links.append(links)
        for peer in peers:
            peer.update_routers(infos)
        others = [link for links in all_links for link in links.links().values()]
        await World.until(lambda: all(link.connected for link in others))
        replica = await worlds[0].add("gen", "gen-1")
        assert replica is not None
        for world in worlds[1:]:
            world.running["gen"] = worlds[0].running["gen"]
            world.update("gen")
            await world.until(lambda w=world: w.gateway.pools["gen"].replicas.num_ready == 1)
        for peer in peers:
            await peer.settle()
        answers = [await ask(world, "a").done() for _ in range(12) for world in worlds]
        num_admitted = sum(answer.status == 200 for answer in answers)
        assert (
            9 <= num_admitted <= 10 + 3 + 2
        )  # the quota, one extra per router, and refills during the test
        for peer in peers * 3:
            await peer.settle()
        shares = [w.gateway.admission.quotas.accounts["a"].share for w in worlds]
        assert sum(shares) == pytest.approx(1, abs=0.1)
        # The share of a stopped router goes to the others.
        for peer in peers[:2] * 2:
            peer.update_routers(infos[:2])
            await peer.settle()
        shares = [w.gateway.admission.quotas.accounts["a"].share for w in worlds[:2]]
        assert sum(shares) == pytest.approx(1, abs=0.1)


async def test_invalid_quota_report_is_refused() -> None:
    async with gateway_world() as world:
        peers = QuotaSync(world.gateway.admission, world.gateway.pools, RouterLinks("r0", SECRET))
        app = peers.wrap(world.app)
        assert (await asgi.post(app, "/internal/leases", b"\xff\x00junk")).status == 400
        assert (await asgi.post(app, "/internal/leases", b"x" * 5_000_000)).status == 400
        assert (await asgi.post(world.app, "/internal/leases", {})).status == 404
        await peers.close()


async def test_quota_refusals_are_counted_and_logged() -> None:
    async with gateway_world() as world:
        request = {"model": "gen", "prompt": "x"}
        headers = {"x-request-timeout-seconds": "never"}
        answer = await asgi.post(world.app, "/v1/completions", request, headers=headers)
        assert answer.status == 400
        (failure,) = world.gateway.request_log.failures
        assert (failure.status, failure.model) == (400, "gen")


async def test_a_request_that_is_cancelled_in_the_queue_costs_no_tokens(keys: Keys) -> None:
    keys.write(a={"tokens_per_day": 100_000})
    async with gateway_world(keys.file) as world:
        await world.add("gen", "gen-1")
        account = world.gateway.admission.quotas.accounts
        pool = world.gateway.pools["gen"]
        running = [ask(world, "a", {"wait_before": True}) for _ in range(2)]
        await world.until(lambda: pool.replicas.running[0].in_flight == 2)
        before = account["a"].day_tokens
        queued = ask(world, "a", {"max_tokens": 5000})
        await world.until(lambda: pool.num_queued == 1)
        assert account["a"].day_tokens > before
        await queued.cancel()
        assert account["a"].day_tokens == before
        for call in running:
            await call.cancel()


async def test_only_requests_with_usage_teach_the_service_time() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        capacity = world.gateway.pools["gen"].queue.capacity
        await asgi.get(world.app, "/v1/models")
        await asgi.get(world.app, "/openapi.json")
        assert (await ask(world, "").done()).status == 200
        assert capacity.average_request_s(1.0) == 0.0
        assert (await ask(world, "", {"prompt_tokens": 7}).done()).status == 200
        assert capacity.average_request_s(1.0) > 0.0


async def test_a_prompt_that_the_engine_shortens_may_be_longer_than_the_context() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        world.running["gen"]["gen-1"] = replace(world.running["gen"]["gen-1"], context_tokens=50)
        world.update("gen")
        body = {"messages": [{"role": "user", "content": "a" * 100_000}]}
        assert (await ask(world, "", body).done()).status == 400
        for field in ({"truncate_prompt_tokens": 20}, {"truncate_prompt_tokens": -1}):
            assert (await ask(world, "", body | field).done()).status == 200


async def test_a_truncated_batch_counts_with_all_its_texts() -> None:
    async with gateway_world(max_queued_tokens=1000) as world:
        await world.add("cls", "cls-1")
        texts = {"model": "cls", "input": ["word " * 1000] * 100}
        for limit, status in ((None, 413), (5, 200), (100, 413)):
            body = {**texts, "truncate_prompt_tokens": limit}
            answer = await asgi.post(world.app, "/v1/embeddings", body)
            assert answer.status == status
