"""Money budgets: 429 once spent, by day and month, tenant and key, over several routers."""

import asyncio
import hashlib
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cluster.accounting.usage_log import UsageLog
from cluster.admission import Identity, Tenant, TenantLimits
from cluster.admission.budgets import Budget, period_days
from cluster.admission.keys import parse_keys
from cluster.config import parse
from cluster.errors import OverloadedError
from cluster.gateway import Gateway, GatewayApp, UsageAccount, Wiring
from cluster.gateway.admission.budgets import Budgets
from cluster.gateway.admission.quotas import TenantQuotas
from cluster.key_file import KeyFile
from cluster.metrics import Registry, exposition
from cluster.usage import Usage
from tests import asgi

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
DAY_S = 86400


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


def make_account(path: Path, clock: Clock) -> UsageAccount:
    config = parse({"generators": [{"name": "gen", "model": "m"}], "accounting": PRICES})
    return UsageAccount(config, UsageLog(path, 10, clock), clock)


PRICES = {"per_cpu_hour": 1.0}


def identity(key: str = "k", budget: Budget | None = None, **tenant: Any) -> Identity:
    return Identity(Tenant("acme", budget=Budget(**tenant)), key=key, budget=budget or Budget())


def make_budgets(path: Path, clock: Clock, *identities: Identity) -> Budgets:
    registry = Registry()
    return Budgets(make_account(path, clock), None, registry, lambda: identities, clock)


def test_periods_end_at_midnight_and_at_the_first_of_the_month() -> None:
    day = int(NOON // DAY_S)
    assert period_days("day", NOON) == (day, day + 1)
    assert period_days("month", NOON) == (day - 30, day + 1)
    assert period_days("month", NOON + DAY_S) == (day + 1, day + 29)


async def test_a_spent_budget_refuses_until_it_renews(tmp_path: Path) -> None:
    clock, acme = Clock(), identity(cost_per_day=1.0)
    budgets = make_budgets(tmp_path / "usage", clock, acme)
    budgets.check(acme)
    budgets.add(acme, 0.9)
    budgets.check(acme)
    (row,) = budgets.report("acme")
    assert (row["state"], row["soft_limit"], row["spent"]) == ("soft", 0.8, 0.9)
    budgets.add(acme, 0.2)
    with pytest.raises(OverloadedError) as refused:
        budgets.check(acme)
    assert str(refused.value) == (
        "The daily budget of tenant 'acme' is spent: 1.1 of 1 EUR. It renews at "
        "2026-02-01T00:00:00Z."
    )
    assert refused.value.retry_after_s == 12 * 3600
    clock.now += 12 * 3600
    budgets.check(acme)
    assert budgets.report("acme")[0]["state"] == "open"
    assert budgets.report("other") == []


async def test_a_key_has_its_own_budget_within_its_tenants(tmp_path: Path) -> None:
    small = identity("small", Budget(cost_per_month=1.0), cost_per_month=10.0)
    large = identity("large", cost_per_month=10.0)
    budgets = make_budgets(tmp_path / "usage", Clock(), small, large)
    budgets.add(small, 2.0)
    with pytest.raises(OverloadedError, match="monthly budget of key small of tenant 'acme'"):
        budgets.check(small)
    budgets.check(large)
    budgets.add(large, 8.5)
    with pytest.raises(OverloadedError, match=r"monthly budget of tenant 'acme' is spent: 10\.5"):
        budgets.check(large)


async def test_rules_see_the_most_used_limit(tmp_path: Path) -> None:
    limits = TenantLimits(tokens_per_day=100)
    free = Identity(Tenant("free"))
    small = Identity(Tenant("acme", limits=limits, budget=Budget(cost_per_day=4.0)), key="k")
    own = replace(small, key="own", budget=Budget(cost_per_month=2.5))
    quotas = TenantQuotas(Registry())
    quotas.budgets = make_budgets(tmp_path / "usage", Clock(), free, small, own)
    assert quotas.budget_used(free) is None
    assert quotas.budget_used(small) == 0
    quotas.admit(small, "gen", (10.0, 0.0)).end(200, Usage(60, 0, 0), False)
    assert quotas.budget_used(small) == pytest.approx(0.6)
    quotas.budgets.add(own, 3.0)
    assert quotas.budget_used(small) == pytest.approx(0.75)
    assert quotas.budget_used(own) == pytest.approx(1.2)


async def test_the_spend_survives_restarts_and_is_that_of_all_routers(tmp_path: Path) -> None:
    clock, acme = Clock(), identity(cost_per_month=2.0)
    routers = [make_budgets(tmp_path / "usage", clock, acme) for _ in range(2)]
    for router in routers:
        router.add(acme, 0.6)
        await router.refresh()
    await routers[0].refresh()
    new = make_budgets(tmp_path / "usage", clock, acme)
    await new.refresh()
    for router in (*routers, new):
        assert router.spent("acme", "", "month") == pytest.approx(1.2)
        assert router.spent("acme", "k", "day") == pytest.approx(1.2)
    new.add(acme, 0.9)
    await new.refresh()
    await new.refresh()  # counts nothing twice
    assert new.spent("acme", "", "month") == pytest.approx(2.1)
    clock.now += DAY_S
    await new.refresh()
    assert new.spent("acme", "", "month") == 0


async def test_a_restarted_router_reads_the_spend_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.gateway.admission.budgets.REFRESH_S", 10_000.0)
    clock, acme = Clock(), identity(cost_per_day=1.0)
    budgets = make_budgets(tmp_path / "usage", clock, acme)
    budgets.add(acme, 1.5)
    await budgets.refresh()
    new = make_budgets(tmp_path / "usage", clock, acme)
    new.start()
    try:
        async with asyncio.timeout(60):
            while not new.spent("acme", "", "day"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        await new.close()
    with pytest.raises(OverloadedError):
        new.check(acme)


async def test_spend_is_kept_while_the_file_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = identity(cost_per_day=9.0)
    budgets = make_budgets(tmp_path / "usage", Clock(), acme)
    with monkeypatch.context() as patch:
        failure = sqlite3.OperationalError("database or disk is full")
        patch.setattr(UsageLog, "_write", lambda *_: (_ for _ in ()).throw(failure))
        for _ in range(3):
            budgets.add(acme, 0.5)
            with pytest.raises(sqlite3.OperationalError):
                await budgets.refresh()
    assert budgets.spent("acme", "", "day") == pytest.approx(1.5)
    budgets.add(acme, 0.5)
    for _ in range(2):
        await budgets.refresh()
        assert budgets.spent("acme", "k", "day") == pytest.approx(2.0)


async def test_gauges_show_the_state(tmp_path: Path) -> None:
    acme, registry = identity(cost_per_day=1.0), Registry()
    account = make_account(tmp_path / "usage", Clock())
    budgets = Budgets(account, None, registry, lambda: [acme], Clock())
    budgets.add(acme, 0.85)
    text = exposition(registry).decode()
    assert 'tandem_budget_state{key="",period="day",tenant="acme"} 1' in text
    assert 'tandem_budget_spent_ratio{key="",period="day",tenant="acme"} 0.85' in text


DIGEST = hashlib.sha256(b"key").hexdigest()


@asynccontextmanager
async def gateway_of_acme(tmp_path: Path) -> AsyncIterator[tuple[Gateway, Identity]]:
    """Yield a gateway whose one key and its tenant have a budget, and the identity of the key."""
    contents = {
        "tenants": {"acme": {"cost_per_day": 1.5}},
        "keys": [{"sha256": DIGEST, "tenant": "acme", "cost_per_month": 3}],
    }
    file = tmp_path / "keys.yaml"
    file.write_text(json.dumps(contents))
    (found,) = parse_keys(file.read_text(), "file").identities().values()
    assert found.budget == Budget(cost_per_month=3)
    account = make_account(tmp_path / "usage", Clock())
    config = parse({"generators": [{"name": "gen", "model": "m"}], "accounting": PRICES})
    key_file = KeyFile(file, expected=True)
    gateway = Gateway(config, {"gen": Wiring(b"s" * 32)}, usage=account, key_file=key_file)
    try:
        yield gateway, found
    finally:
        await gateway.close()


async def test_a_gateway_refuses_and_reports(tmp_path: Path) -> None:
    async with gateway_of_acme(tmp_path) as (gateway, acme):
        app, headers = GatewayApp(gateway), {"authorization": "Bearer key"}
        gateway.budgets.add(acme, 2.0)
        body = {"model": "gen", "messages": []}
        answer = await asgi.post(app, "/v1/chat/completions", body, headers=headers)
        assert answer.status == 429
        assert "daily budget of tenant 'acme'" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) > 0
        rows = (await asgi.get(app, "/v1/usage", headers=headers)).json()["budgets"]
        assert [(row["key"], row["period"], row["state"]) for row in rows] == [
            (DIGEST[:16], "month", "open"),
            (None, "day", "spent"),
        ]
        shown = (await asgi.get(app, "/dashboard/data", headers=headers)).json()["budgets"]
        assert [row["state"] for row in shown] == ["open", "spent"]
        assert (await asgi.get(app, "/v1/usage/spend", headers=headers)).status == 403
