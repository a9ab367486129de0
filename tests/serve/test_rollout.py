"""Two versions of a model behind one gateway: shares, faults of the new one, copies, operators."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec import structs

from cluster.asgi import Receive, Scope, Send, usage_of
from cluster.errors import NotFoundError
from cluster.gateway.pools.labels import compare_labels
from cluster.gateway.pools.rollout import MAX_COPIES, Rollout
from cluster.rollout import Action, RolloutState
from tests import asgi
from tests.serve.gateway_kit import CHAT, World, gateway_world, metrics

ROLLOUT = {"rollout": {"model": "n", "version": "2"}}
STATE = RolloutState(version="2", model="n", replicas=1, room=1, since=0.0, phase="canary")


class Version:
    """Replica of one version, which answers with its name, an error, or labels."""

    def __init__(self, name: str, status: int = 200, body: Any = None) -> None:
        self.name = name
        self.status = status
        self.body = body or {"version": name}
        self.num_requests = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        self.num_requests += 1
        await self.gate.wait()
        usage = usage_of(scope)
        usage.prompt_tokens, usage.completion_tokens = 3, 4
        headers = [(b"content-type", b"application/json")]
        start = {"type": "http.response.start", "status": self.status, "headers": headers}
        await send(start)
        await send({"type": "http.response.body", "body": json.dumps(self.body).encode()})


@asynccontextmanager
async def versions(
    old: Version, new: Version, pool: str = "gen", **options: Any
) -> AsyncIterator[tuple[World, Rollout]]:
    kind = "generator" if pool == "gen" else "classifier"
    settings = {kind: {**ROLLOUT, "max_in_flight": 64}}
    async with gateway_world(**settings, **options) as world:
        routes = (CHAT, "/classify")
        await world.serve(old, pool, "old-1", routes)
        await world.serve(new, f"{pool}@2", "new-1", routes)
        yield world, world.gateway.rollouts[pool]


def state(share: float = 0.0, *, is_shadowed: bool = False) -> RolloutState:
    return structs.replace(STATE, share=share, is_shadowed=is_shadowed)


async def ask(world: World, session: str, model: str = "gen", path: str = CHAT) -> asgi.Answer:
    return await asgi.post(world.app, path, {"model": model}, headers={"x-session-id": session})


async def test_sessions_are_divided_and_keep_their_version_while_the_share_grows() -> None:
    async with versions(Version("old"), Version("new")) as (world, rollout):
        before: dict[str, str] = {}
        for share in (0.0, 30.0, 60.0, 100.0):
            rollout.update(state(share))
            now = {s: (await ask(world, s)).json()["version"] for s in map(str, range(60))}
            assert all(now[s] == "new" for s, version in before.items() if version == "new")
            counts = Counter(now.values())
            assert abs(counts["new"] - 0.6 * share) <= 12  # more than three standard deviations
            before = now
        found = await metrics(world)
        assert found["tandem_rollout_share_ratio", "gen"] == 1.0
        num_new = rollout.totals().new.finished
        assert found["tandem_requests_total", "gen@2", CHAT, "200"] == num_new
        totals = rollout.totals()
        assert totals.old.finished + totals.new.finished == 240
        assert totals.new.tokens == 4 * totals.new.finished


async def test_without_a_state_the_old_version_answers() -> None:
    async with versions(Version("old"), Version("new")) as (world, rollout):
        assert (await ask(world, "a")).json() == {"version": "old"}
        for other in ({"version": "1"}, {"model": "x"}):
            rollout.update(structs.replace(state(100), **other))
            assert (await ask(world, "a")).json() == {"version": "old"}


@pytest.mark.parametrize("status", [500, 400])
async def test_the_old_version_answers_what_the_new_one_cannot(status: int) -> None:
    new = Version("new", status, {"error": {"message": "no"}})
    async with versions(Version("old"), new) as (world, rollout):
        rollout.update(state(100))
        answer = await ask(world, "a")
        assert (answer.status, answer.json()) == (200, {"version": "old"})
        await world.until_idle()
        totals = rollout.totals()
        assert (totals.new.finished, totals.new.failed) == (1, 1)
        assert (totals.old.finished, totals.old.failed) == (1, 0)
        assert (await metrics(world))["tandem_rollout_retries_total", "gen"] == 1


async def test_an_error_of_both_versions_is_the_clients() -> None:
    body = {"error": {"message": "no"}}
    async with versions(Version("old", 400, body), Version("new", 400, body)) as (world, rollout):
        rollout.update(state(100))
        assert (await ask(world, "a")).status == 400
        await world.until_idle()
        assert rollout.totals().new.failed == 0


async def test_a_lost_version_is_replaced_by_the_other_one() -> None:
    async with versions(Version("old"), Version("new")) as (world, rollout):
        rollout.update(state(100))
        world.remove("gen@2", "new-1")
        assert (await ask(world, "a")).json() == {"version": "old"}
        rollout.update(state(30))
        world.remove("gen", "old-1")
        await world.serve(Version("new"), "gen@2", "new-2", (CHAT,))
        answers = {(await ask(world, str(s))).json()["version"] for s in range(20)}
        assert answers == {"new"}


async def test_requests_wait_for_the_version_that_will_have_replicas() -> None:
    """Without room for two replicas, the old one stops before the new one starts."""
    async with versions(Version("old"), Version("new")) as (world, rollout):
        world.remove("gen@2", "new-1")
        rollout.update(state(100))
        assert (await ask(world, "a")).json() == {"version": "old"}
        world.remove("gen", "old-1")
        waiting = [asyncio.create_task(ask(world, str(n))) for n in range(2)]
        await world.until(lambda: world.gateway.pools["gen@2"].num_queued == 2)
        await world.serve(Version("new"), "gen@2", "new-2", (CHAT,))
        assert [answer.json()["version"] for answer in await asyncio.gather(*waiting)] == [
            "new"
        ] * 2


async def test_what_waits_for_a_version_that_is_rolled_back_goes_to_the_old_one() -> None:
    async with versions(Version("old"), Version("new")) as (world, rollout):
        rollout.update(state(100))
        world.remove("gen@2", "new-1")
        world.remove("gen", "old-1")
        waiting = asyncio.create_task(ask(world, "a"))
        await world.until(lambda: world.gateway.pools["gen@2"].num_queued == 1)
        rollout.update(structs.replace(state(), phase="rolled_back"))
        await world.until(lambda: world.gateway.pools["gen"].num_queued == 1)
        await world.serve(Version("old"), "gen", "old-2", (CHAT,))
        assert (await waiting).json() == {"version": "old"}


async def test_a_tenants_quota_is_charged_once_for_a_retried_request() -> None:
    new = Version("new", 500, {"error": {"message": "no"}})
    async with versions(Version("old"), new) as (world, rollout):
        rollout.update(state(100))
        await ask(world, "a")
        await world.until_idle()
        accounts = world.gateway.admission.quotas.accounts.values()
        assert [account.concurrent for account in accounts] == [0]
        found = await metrics(world)
        assert found["tandem_tenant_requests_total", "200", ""] == 1
        assert ("tandem_tenant_requests_total", "500", "") not in found


async def test_candidates_are_no_models() -> None:
    async with versions(Version("old"), Version("new")) as (world, _):
        assert (await ask(world, "a", model="gen@2")).status == 404
        listed = (await asgi.get(world.app, "/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["gen", "cls"]


# -- copies ----------------------------------------------------------------------------------------


async def test_copies_are_discarded_limited_and_free() -> None:
    old, new = Version("old"), Version("new")
    async with versions(old, new) as (world, rollout):
        rollout.draw = lambda: 0.0  # copies every request
        rollout.update(state(is_shadowed=True))
        new.gate.clear()
        for number in range(MAX_COPIES + 3):
            assert (await ask(world, str(number))).json() == {"version": "old"}
        await world.until(lambda: new.num_requests == MAX_COPIES)
        new.gate.set()
        await world.until_idle()
        found = await metrics(world)
        assert found["tandem_rollout_copies_total", "gen", "answered"] == MAX_COPIES
        assert found["tandem_rollout_copies_total", "gen", "skipped"] == 3
        assert found["tandem_tenant_requests_total", "200", ""] == MAX_COPIES + 3
        assert rollout.totals().new.finished == MAX_COPIES


async def test_a_failing_copy_is_no_clients() -> None:
    new = Version("new", 500, {"error": {"message": "no"}})
    async with versions(Version("old"), new) as (world, rollout):
        rollout.draw = lambda: 0.0
        rollout.update(state(is_shadowed=True))
        assert (await ask(world, "a")).json() == {"version": "old"}
        await world.until(lambda: rollout.totals().new.failed == 1)


async def test_labels_of_both_versions_are_compared() -> None:
    def labels(*names: str) -> dict[str, Any]:
        return {"data": [{"index": i, "label": name, "score": 0.9} for i, name in enumerate(names)]}

    old, new = Version("old", body=labels("a", "b")), Version("new", body=labels("a", "c"))
    async with versions(old, new, "cls") as (world, rollout):
        rollout.draw = lambda: 0.0
        rollout.update(state(is_shadowed=True))
        answer = await ask(world, "a", "cls", "/classify")
        assert answer.json() == labels("a", "b")
        await world.until(lambda: rollout.totals().new.compared == 2)
        assert rollout.totals().new.agreed == 1


@pytest.mark.parametrize(
    ("old", "new", "result"),
    [
        ({"data": [{"label": "a"}, {"label": "b"}]}, {"data": [{"label": "a"}]}, (2, 1)),
        (  # Hugging Face: all labels of each text, in the order of their scores
            [[{"label": "a", "score": 0.9}, {"label": "b", "score": 0.1}]],
            [[{"label": "a", "score": 0.6}, {"label": "b", "score": 0.4}]],
            (1, 1),
        ),
        (
            {"entities": [{"label": "PER", "score": 1, "start": 0, "end": 4}]},
            {"entities": [{"label": "PER", "score": 1, "start": 0, "end": 5}]},
            (1, 0),
        ),
        ({"data": [{"embedding": [0.1]}]}, {"data": [{"embedding": [0.2]}]}, (0, 0)),
    ],
)
def test_labels_in_the_formats_of_classifiers(old: Any, new: Any, result: tuple[int, int]) -> None:
    assert compare_labels(json.dumps(old).encode(), json.dumps(new).encode()) == result
    assert compare_labels(b"{", b"{}") == (0, 0)


# -- operators -------------------------------------------------------------------------------------


class Control:
    """Rollouts without Ray: records what it is asked to do."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def states(self) -> dict[str, RolloutState]:
        return {"gen": STATE.note(1.0, "started", "room for 1")}

    async def start(self, model: str, settings: dict[str, Any]) -> str:
        self.calls.append((model, settings))
        return "2"

    async def act(self, model: str, action: Action) -> None:
        if model != "gen":
            raise NotFoundError("No rollout.")
        self.calls.append((model, action))


async def test_operators_start_and_change_rollouts() -> None:
    control = Control()
    async with gateway_world(rollout_control=control) as world:
        (shown,) = (await asgi.get(world.app, "/v1/rollouts")).json()["data"]
        assert (shown["model"], shown["to"], shown["phase"]) == ("gen", "n", "canary")
        body = {"action": "start", "settings": {"model": "org/n"}}
        started = await asgi.post(world.app, "/v1/rollouts/org/gen", body)
        assert started.json() == {"model": "org/gen", "version": "2"}
        paused = await asgi.post(world.app, "/v1/rollouts/gen", {"action": "pause"})
        assert paused.status == 200
        assert control.calls == [("org/gen", {"model": "org/n"}), ("gen", "pause")]
        assert (await asgi.post(world.app, "/v1/rollouts/x", {"action": "abort"})).status == 404
        assert (await asgi.post(world.app, "/v1/rollouts/gen", {"action": "x"})).status == 400
        text = {"content-type": "text/plain"}
        denied = await asgi.post(world.app, "/v1/rollouts/gen", {"action": "abort"}, headers=text)
        assert denied.status == 400
        assert (await asgi.get(world.app, "/v1/rollouts/gen")).status == 405
