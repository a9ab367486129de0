"""``GET /v1/usage`` and ``usage.tandem``, with a simulated engine behind a router."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.accounting.meter import Meter
from cluster.accounting.replica import ReplicaAccounting
from cluster.accounting.usage_log import UsageLog
from cluster.asgi import Receive, Scope, Send
from cluster.config import GeneratorConfig, parse
from cluster.engines.sim import SimEngine
from cluster.errors import UnavailableError
from cluster.gateway import (
    Gateway,
    GatewayApp,
    ReplicaInfo,
    RouterLinks,
    UsageAccount,
    UsageCopies,
    Wiring,
)
from cluster.gateway.messages import Request
from cluster.gateway.reporting.usage_report import UsageReport
from cluster.link import LinkServer
from cluster.metrics import Registry, exposition
from tests import asgi

SECRET = b"s" * 32
NOW = 1_000_000 * 3600.0
COMPLETIONS = "/v1/completions"
BODY = {"model": "gen", "prompt": "a b c d", "max_tokens": 6}
WATTS = 10.0
WANTS_USAGE = {"x-tandem-usage": "1"}


class AccountedPool:
    def __init__(
        self,
        gateway: Gateway,
        account: UsageAccount,
        accounting: ReplicaAccounting,
        cpu: list[float],
    ) -> None:
        self.gateway = gateway
        self.account = account
        self.app = GatewayApp(gateway)
        self.accounting = accounting
        self._cpu = cpu

    async def spend(self, cpu_s: float) -> None:
        """Charge the replica's requests for CPU time."""
        self._cpu[0] += cpu_s
        await self.accounting.divide()


@asynccontextmanager
async def accounted_pool(
    tmp_path: Path, watts: float | None = WATTS, **more: Any
) -> AsyncIterator[AccountedPool]:
    accounting = {"per_cpu_hour": 3600.0, **more.pop("accounting", {})}
    gen = {"name": "gen", "model": "m", "engine": "sim"}
    config = parse({"generators": [gen], "accounting": accounting, **more})
    engine = SimEngine(GeneratorConfig.model_validate(gen))
    await engine.start()
    cpu = [0.0]
    meter = Meter(
        watts_per_core=watts,
        gpu_joules=None,
        rapl_joules=None,
        reason="no-counter",
        own_cpu_s=lambda: cpu[0],
        machine_cpu_s=lambda: 0.0,
    )
    replica_accounting = ReplicaAccounting("gen", meter, price_per_s=1.0, interval_s=3600)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        work = replica_accounting.open_request(scope)
        try:
            await engine.app(scope, receive, send)
        finally:
            if work is not None:
                work.end()

    server = LinkServer(app, SECRET)
    host, port = await server.start()
    usage = UsageAccount(
        config, UsageLog(tmp_path / "usage", 10, lambda: NOW), clock=lambda: NOW + 60
    )
    gateway = Gateway(config, {"gen": Wiring(SECRET)}, usage=usage)
    gateway.pools["gen"].update([ReplicaInfo("gen-1", host, port, engine.routes())])
    try:
        yield AccountedPool(gateway, usage, replica_accounting, cpu)
    finally:
        await gateway.close()
        await server.stop()
        await replica_accounting.close()
        await engine.stop()


async def get(app: GatewayApp, query: str, headers: dict[str, str] | None = None) -> asgi.Answer:
    async def with_query(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "query_string": query.encode()}, receive, send)

    return await asgi.get(with_query, "/v1/usage", headers=headers)


async def test_usage_of_all_nodes_is_summed_and_each_file_counts_once(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    async with accounted_pool(tmp_path) as pool, accounted_pool(tmp_path / "other") as other:
        for world, number in ((pool, 1), (other, 2)):
            for _ in range(number):
                await asgi.post(world.app, COMPLETIONS, BODY)
        gateways = other.gateway, other.gateway, pool.gateway  # two nodes with two routers each
        apps = [GatewayApp(gateway, authenticates=False) for gateway in gateways]
        servers = [LinkServer(app, SECRET) for app in apps]
        routers = RouterLinks("own", SECRET)
        addresses = [await server.start() for server in servers]
        routers.update([ReplicaInfo(f"r{i}", *address) for i, address in enumerate(addresses)])
        await asyncio.gather(*(link.connect() for link in routers.links().values()))
        report = UsageReport(pool.account, routers, pool.gateway.budgets)
        assert await requests(report) == 3
        for server in servers:
            await server.stop()
        with pytest.raises(UnavailableError, match="did not report its usage"):
            await requests(report)
        await routers.close()


async def test_usage_survives_the_loss_of_a_node(tmp_path: Path) -> None:
    """A node without a copy asks one that has it; the latest copy of each hour counts."""
    nodes = [tmp_path / name for name in ("lost", "copying", "asked")]
    for node in nodes:
        node.mkdir()
    async with (
        accounted_pool(nodes[0]) as lost,
        accounted_pool(nodes[1]) as copying,
        accounted_pool(nodes[2]) as asked,
    ):
        for world in (lost, lost, copying, asked):
            await asgi.post(world.app, COMPLETIONS, BODY)
        servers = [
            LinkServer(GatewayApp(world.gateway, authenticates=False), SECRET)
            for world in (lost, copying)
        ]
        first, second = [
            ReplicaInfo(f"r{i}", *await server.start()) for i, server in enumerate(servers)
        ]
        routers = RouterLinks("own", SECRET)
        copies = UsageCopies(copying.account, routers)
        routers.update([first])
        await asyncio.gather(*(link.connect() for link in routers.links().values()))
        await copies.copy()
        await asgi.post(lost.app, COMPLETIONS, BODY)
        await copies.copy()
        assert await requests(UsageReport(copying.account, routers, copying.gateway.budgets)) == 4
        await servers[0].stop()
        routers.update([])
        assert await requests(UsageReport(copying.account, routers, copying.gateway.budgets)) == 4
        routers.update([second])
        await asyncio.gather(*(link.connect() for link in routers.links().values()))
        assert await requests(UsageReport(asked.account, routers, asked.gateway.budgets)) == 5
        await copies.close()
        await routers.close()
        await servers[1].stop()


async def requests(report: UsageReport) -> int:
    """Return the number of requests that ``/v1/usage`` reports."""
    answer = await report.handle(Request("id", "GET", "/v1/usage", b"", [], b""))
    data = json.loads(b"".join([chunk async for chunk in answer.body]))["data"]
    return sum(row["requests"] for row in data)


async def test_responses_are_unchanged_unless_usage_is_requested(tmp_path: Path) -> None:
    async with accounted_pool(tmp_path) as pool:
        plain = await asgi.post(pool.app, COMPLETIONS, BODY)
        assert b"tandem" not in plain.body
        stream = await asgi.post(pool.app, COMPLETIONS, {**BODY, "stream": True})
        assert b"tandem" not in stream.body
        assert stream.body.endswith(b"data: [DONE]\n\n")


async def test_usage_in_a_response_has_joules_and_cost_with_their_source(tmp_path: Path) -> None:
    async with accounted_pool(tmp_path) as pool:
        first = await asgi.post(pool.app, COMPLETIONS, BODY, headers=WANTS_USAGE)
        usage = first.json()["usage"]["tandem"]
        assert usage["joules"] is None
        assert "just started" in usage["joules_missing"]
        await pool.spend(cpu_s=2.0)
        answer = await asgi.post(pool.app, COMPLETIONS, BODY, headers=WANTS_USAGE)
        assert int(answer.headers["content-length"]) == len(answer.body)
        usage = answer.json()["usage"]["tandem"]
        assert usage["source"] == "estimate"
        # 2 s at 10 W for the first request; this one has as many tokens.
        assert usage["joules"] == pytest.approx(20.0, rel=0.01)
        assert usage["currency"] == "EUR"
        assert usage["cost"] >= 0


@pytest.mark.parametrize("guards", [[], [{"name": "g", "patterns": ["card"], "action": "redact"}]])
async def test_usage_of_a_stream_is_an_event_after_the_last_one(
    tmp_path: Path, guards: list[dict[str, Any]]
) -> None:
    async with accounted_pool(tmp_path, guards=guards) as pool:
        await asgi.post(pool.app, COMPLETIONS, BODY)
        await pool.spend(cpu_s=2.0)
        body = {**BODY, "stream": True}
        answer = await asgi.post(pool.app, COMPLETIONS, body, headers=WANTS_USAGE)
        assert [data for _, data in answer.events()][-2] == "[DONE]"
        name, data = answer.events()[-1]
        assert name == "tandem.usage"
        assert json.loads(data)["joules"] == pytest.approx(20.0, rel=0.01)


async def test_usage_in_all_whole_responses_can_be_configured(tmp_path: Path) -> None:
    async with accounted_pool(tmp_path, accounting={"in_answers": True}) as pool:
        assert "tandem" in (await asgi.post(pool.app, COMPLETIONS, BODY)).json()["usage"]
        stream = await asgi.post(pool.app, COMPLETIONS, {**BODY, "stream": True})
        assert b"tandem" not in stream.body
        declined = await asgi.post(pool.app, COMPLETIONS, BODY, headers={"x-tandem-usage": "0"})
        assert "tandem" not in declined.json()["usage"]
        wrong = await asgi.post(pool.app, COMPLETIONS, BODY, headers={"x-tandem-usage": "yes"})
        assert wrong.status == 400
        refused = await asgi.post(pool.app, COMPLETIONS, {**BODY, "max_tokens": -1})
        assert refused.status == 400
        assert "usage" not in refused.json()
        # A response without ``usage`` is unchanged.
        tokens = await asgi.post(pool.app, "/tokenize", {"model": "gen", "prompt": "a"})
        assert "usage" not in tokens.json()


async def test_without_a_counter_joules_are_missing_with_the_reason(tmp_path: Path) -> None:
    async with accounted_pool(tmp_path, watts=None) as pool:
        await asgi.post(pool.app, COMPLETIONS, BODY)
        await pool.spend(cpu_s=2.0)
        answer = await asgi.post(pool.app, COMPLETIONS, BODY, headers=WANTS_USAGE)
        usage = answer.json()["usage"]["tandem"]
        assert usage["joules"] is None
        assert "watts_per_core is not set" in usage["joules_missing"]
        registry = Registry()
        pool.accounting.observe(registry)
        assert b"tandem_energy" not in exposition(registry)
        assert b'tandem_cost_total{model="gen",tenant="_anonymous"}' in exposition(registry)


async def test_long_responses_are_passed_on_without_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.gateway.pools.response_usage.MAX_HELD_BYTES", 10)
    async with accounted_pool(tmp_path) as pool:
        answer = await asgi.post(pool.app, COMPLETIONS, BODY, headers=WANTS_USAGE)
        assert answer.json()["usage"]["completion_tokens"] == 6
        assert "tandem" not in answer.json()["usage"]


async def test_usage_is_summed_by_hour_tenant_and_model(tmp_path: Path) -> None:
    async with accounted_pool(tmp_path) as pool:
        for _ in range(3):
            await asgi.post(pool.app, COMPLETIONS, BODY)
        await pool.spend(cpu_s=3.0)
        await asgi.post(pool.app, COMPLETIONS, BODY)
        answer = await get(pool.app, "")
        assert answer.status == 200
        rows = {row.get("joules_source"): row for row in answer.json()["data"]}
        assert rows[None]["requests"] == 3
        assert "just started" in rows[None]["joules_missing"]
        assert rows["estimate"]["tenant"] == "_anonymous"
        assert rows["estimate"]["model"] == "gen"
        assert rows["estimate"]["completion_tokens"] == 6
        assert rows["estimate"]["joules"] == pytest.approx(10.0, rel=0.01)
        assert answer.json()["total"]["requests"] == 4
        assert answer.json()["currency"] == "EUR"

        lines = (await get(pool.app, "format=csv")).body.decode().splitlines()
        assert lines[0].startswith("hour,tenant,model,requests")
        assert len(lines) == 3
        assert (await get(pool.app, f"start={NOW + 3600}&end={NOW + 7200}")).json()["data"] == []
        assert (await get(pool.app, "tenant=nobody")).json()["data"] == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("start=never", "start"),
        ("start=2&end=1", "start"),
        ("format=xml", "format"),
        ("since=1", "since"),
    ],
)
async def test_invalid_queries_name_the_parameter(tmp_path: Path, query: str, param: str) -> None:
    async with accounted_pool(tmp_path) as pool:
        answer = await get(pool.app, query)
        assert answer.status == 400
        assert answer.json()["error"]["param"] == param


async def test_a_tenant_sees_its_own_usage_and_an_operator_all(tmp_path: Path) -> None:
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("k1", "k2", "op")}
    router = {
        "api_keys_sha256": [digests["k1"], digests["k2"]],
        "operator_keys_sha256": [digests["op"]],
    }
    keys = {name: {"authorization": f"Bearer {name}"} for name in digests}
    one, two = digests["k1"][:16], digests["k2"][:16]
    async with accounted_pool(tmp_path, router=router) as pool:
        for name in ("k1", "k2"):
            answer = await asgi.post(pool.app, COMPLETIONS, BODY, headers=keys[name])
            assert answer.status == 200

        async def tenants(query: str, name: str) -> set[str]:
            answer = await get(pool.app, query, keys[name])
            assert answer.status == 200
            return {row["tenant"] for row in answer.json()["data"]}

        assert await tenants("", "k1") == {one}
        assert await tenants(f"tenant={one}", "k1") == {one}
        assert await tenants("", "op") == {one, two}
        assert await tenants(f"tenant={two}", "op") == {two}
        assert (await get(pool.app, f"tenant={two}", keys["k1"])).status == 403
        assert (await get(pool.app, "")).status == 401


async def test_a_client_disconnect_while_a_response_is_held_frees_the_slot(
    tmp_path: Path,
) -> None:
    async with accounted_pool(tmp_path) as pool:
        call = asgi.start(pool.app, "POST", COMPLETIONS, {**BODY, "max_tokens": 8000}, WANTS_USAGE)
        async with asyncio.timeout(30):
            while not pool.gateway.num_open_requests:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        await call.cancel()
        async with asyncio.timeout(30):  # until the replica has reported the usage
            while pool.gateway.num_open_requests:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
