"""Data of the dashboard and lines of the request log, over real links."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import pytest
from rich.console import Console

from cluster.autoscaling import TargetChange
from cluster.cli import top
from cluster.gateway.recording.request_log import LOGGER
from cluster.gateway.recording.tenant_seconds import TenantSeconds
from cluster.gateway.reporting.dashboard import service
from cluster.gateway.reporting.dashboard.history import History
from tests import asgi
from tests.serve.gateway_kit import CHAT, World, gateway_world


async def dashboard_data(world: World, since: int = 0) -> Any:
    answer = await asgi.get(world.app, f"/dashboard/data?since={since}")
    assert answer.status == 200
    return answer.json()


async def test_second_holds_the_difference_to_the_previous_one() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        history = History(world.gateway.registry, world.gateway.pools, TenantSeconds())
        history.sample(1000.0, 1.0)
        assert history.since(0) == []
        for _ in range(3):
            await asgi.post(world.app, CHAT, {"model": "gen", "stream": 2})
        await asgi.post(world.app, CHAT, {"model": "gen", "fail": True})
        await asgi.post(world.app, CHAT, {"model": "no-such-model"})
        await asgi.get(world.app, "/ready")
        history.sample(1001.0, 2.0)
        history.sample(1002.1, 3.5)
        first, second = history.since(0)
        assert (first.time, first.span_s, second.time, second.span_s) == (1000, 1.0, 1001, 1.5)
        pool = first.pools["gen"]
        assert (pool.requests, pool.failed, pool.refused) == (4, 1, 0)
        assert (first.unrouted, second.unrouted) == (1, 0)
        assert sum(pool.latencies["ttft"].values()) == 3
        assert sum(pool.latencies["total"].values()) == 4
        assert second.pools["gen"].requests == 0
        assert second.pools["gen"].latencies == {}
        assert history.since(1000) == [second]
        (change,) = history.changes
        assert (change.model, change.added, change.removed) == ("gen", ["gen-1"], [])
        world.remove("gen", "gen-1")
        history.sample(1003.0, 4.5)
        assert (history.changes[-1].removed, history.changes[-1].replicas) == (["gen-1"], 0)


async def test_history_survives_clock_changes() -> None:
    async with gateway_world() as world:
        history = History(world.gateway.registry, world.gateway.pools, TenantSeconds())
        for number, now in enumerate((1000, 1001, 1000, 1002, 500, 501)):
            history.sample(now, float(number))
            times = [second.time for second in history.since(0)]
            assert times == sorted(set(times))
        assert times == [499, 500]


async def test_data_covers_all_pools_and_lists_failures_without_text() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        await asgi.post(world.app, CHAT, {"model": "gen", "stream": 1, "text": "secret"})
        await asgi.post(
            world.app, CHAT, {"model": "secret"}, headers={"x-request-id": "wrong-model"}
        )
        async with asyncio.timeout(60):
            while not (found := await dashboard_data(world))["times"]:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        assert set(found["rows"]) == {"", "gen", "cls"}
        assert all(len(rows) == len(found["times"]) for rows in found["rows"].values())
        assert len(found["columns"]) == len(found["rows"][""][0])
        assert found["routers"] == {"router": True}
        assert found["pools"]["gen"]["replicas"][0]["id"] == "gen-1"
        (failure,) = found["failures"]
        assert (failure["id"], failure["status"]) == ("wrong-model", 404)
        assert "secret" not in json.dumps(found)
        last = found["times"][-1]
        assert all(each > last for each in (await dashboard_data(world, last))["times"])


async def test_current_levels_are_consistent(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway_world() as world:
        replica = await world.add("gen", "gen-1")
        held = asgi.start(world.app, "POST", CHAT, {"model": "gen", "wait_before": True})
        async with asyncio.timeout(60):
            while not sampled(await dashboard_data(world)):  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        monkeypatch.setattr(service, "REFRESH_INTERVAL_S", 3600.0)
        replica.gate.set()
        await held.done()
        found = await dashboard_data(world)
        assert sampled(found) == 1, "the sampled second ended with the request in flight"
        screen = io.StringIO()
        Console(file=screen, width=120).print(top.frame(found, 120))
        lines = [line.split() for line in screen.getvalue().splitlines() if line.strip()]
        shown = {cells[0]: cells for cells in lines}
        assert shown["gen-1"][3] == "0"
        for model in ("gen", "all"):
            ongoing, queued, *_ = shown[model][-3:]
            assert (ongoing, queued) == ("0", "0")


def sampled(data: Any) -> float:
    rows = data["rows"]["gen"]
    return float(rows[-1][data["columns"].index("in_flight")]) if rows else 0.0


async def test_decisions_are_read_rarely_and_the_last_are_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "REFRESH_INTERVAL_S", 0.0)
    num_reads = 0

    async def read() -> list[TargetChange] | None:
        nonlocal num_reads
        num_reads += 1
        return [TargetChange(n, "gen", n, n + 1, "busy", "there are requests") for n in range(30)]

    async with gateway_world() as alone:
        assert (await dashboard_data(alone))["decisions"] is None
    async with gateway_world(read_decisions=read) as world:
        for _ in range(4):
            found = (await dashboard_data(world))["decisions"]
        assert num_reads == 1
    assert [one["before"] for one in found] == list(range(29, 9, -1))
    assert found[0] == {
        "time": 29,
        "pool": "gen",
        "before": 29,
        "target": 30,
        "cause": "busy",
        "reason": "there are requests",
    }


@pytest.mark.parametrize("since", ["-1", "1e3", "%C2%B2", "9" * 13, "x"])
async def test_invalid_since_is_refused(since: str) -> None:
    async with gateway_world() as world:
        answer = await asgi.get(world.app, "/dashboard/data?since=" + since)
        assert answer.status == 400
        assert answer.json()["error"]["param"] == "since"


async def test_data_needs_a_key_but_the_page_does_not() -> None:
    async with gateway_world(api_keys_sha256=["0" * 64]) as world:
        for path, status in (("", 200), ("/data", 401), ("/report", 401)):
            assert (await asgi.get(world.app, f"/dashboard{path}")).status == status
        page = (await asgi.get(world.app, "/dashboard")).body.decode()
        assert "uPlot" in page
        assert "vendor:" not in page


async def test_a_tenant_sees_the_figures_of_its_own_requests_only() -> None:
    keys = {name: sha256(name.encode()).hexdigest() for name in "abo"}
    hashes = {"api_keys_sha256": [keys["a"], keys["b"]], "operator_keys_sha256": [keys["o"]]}

    async def figures(world: World, key: str) -> dict[str, float]:
        """Return the maximum of each column; empty before the first second."""
        headers = {"authorization": f"Bearer {key}"}
        data = (await asgi.call(world.app, "GET", "/dashboard/data", headers=headers)).json()
        columns = zip(*data["rows"]["gen"], strict=True)
        maxima = (max((value or 0 for value in column), default=0) for column in columns)
        return dict(zip(data["columns"], maxima, strict=False))

    async with gateway_world(**hashes) as world:
        await world.add("gen", "gen-1")
        async with asyncio.timeout(60):
            while not await figures(world, "o"):  # noqa: ASYNC110
                await asyncio.sleep(0.2)
            for key, body in {
                "a": {"model": "gen", "stream": 1, "prompt_tokens": 9},
                "b": {"model": "gen", "fail": True},
            }.items():
                await asgi.post(world.app, CHAT, body, headers={"authorization": f"Bearer {key}"})
            while not (await figures(world, "b"))["requests"]:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        a, b, everything = [await figures(world, key) for key in "abo"]
    assert a["requests"] > 0
    assert a["prompt_tokens"] == pytest.approx(9 * a["requests"], rel=0.05)  # rounded
    assert a["ttft_p50"] > 0
    assert a["failed"] == b["prompt_tokens"] == 0
    assert b["failed"] == b["requests"] > 0
    assert everything["failed"] > 0
    assert everything["prompt_tokens"] > 0


async def test_viewers_share_one_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway_world() as world:
        num_refreshes = 0
        add_rows = service.Board.add_rows

        def counted(self: service.Board, *args: Any) -> Iterator[None]:
            nonlocal num_refreshes
            num_refreshes += 1
            return add_rows(self, *args)

        monkeypatch.setattr(service.Board, "add_rows", counted)
        monkeypatch.setattr(service, "REFRESH_INTERVAL_S", 3600.0)
        await asyncio.gather(*(dashboard_data(world) for _ in range(20)))
        assert num_refreshes == 1


async def test_each_request_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    async with gateway_world(queue_timeout_s=0.05) as world:
        replica = await world.add("gen", "gen-1")
        for name, body in {
            "fine": {"model": "gen", "stream": 2},
            "fault": {"model": "gen", "fail": True},
            "unknown": {"model": "no-such-model"},
        }.items():
            await asgi.post(world.app, CHAT, body, headers={"x-request-id": name})
        late = {"x-request-id": "late"}
        await asgi.post(world.app, "/classify", {"model": "cls"}, headers=late)
        asked = {"model": "gen", "stream": 1, "wait_after": True}
        left = asgi.start(world.app, "POST", CHAT, asked, {"x-request-id": "left"})
        await left.chunks(1)
        await left.cancel()
        cut = asgi.start(world.app, "POST", CHAT, asked, {"x-request-id": "cut"})
        await cut.chunks(1)
        await world.servers["gen-1"].stop()
        await cut.done()
        await asgi.get(world.app, "/health")
        assert replica.cancelled
    records = [record for record in caplog.records if record.name == LOGGER]
    lines = {line["id"]: line for line in (json.loads(r.message) for r in records)}
    assert len(lines) == len(records)
    dashboard_data = {name: (line["outcome"], line["status"]) for name, line in lines.items()}
    assert dashboard_data == {
        "fine": ("ok", 200),
        "fault": ("failed", 500),
        "unknown": ("refused", 404),
        "late": ("failed", 503),
        "left": ("left", 499),
        "cut": ("cut_off", 200),
    }
    fine = lines["fine"]
    assert (fine["model"], fine["replica"], fine["route"]) == ("gen", "gen-1", CHAT)
    assert 0 <= fine["queue_s"] <= fine["ttft_s"] <= fine["total_s"] < 60
    assert [r.levelname for r in records if "fault" in r.message] == ["WARNING"]
