"""The decider, the changes of the configuration and the autoscaling policy, without Ray."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.serve.schema import ServeApplicationSchema

from cluster import ray_internals
from cluster.config import parse
from cluster.errors import InvalidRequestError, NotFoundError
from cluster.link import ResponseHead
from cluster.rollout import Figures, RolloutState, Totals
from deployments import rollout_config, rollouts
from deployments import rollout_store as store
from deployments.rollout_config import start_rollout
from deployments.rollout_sync import RolloutAccess, RolloutSync
from deployments.rollouts import Rollouts
from tests.serve.gateway_kit import gateway_world, metrics

APP = "tandem"
ROLLOUT = {"model": "n", "version": "2", "canary": [50, 100], "min_requests": 10, "step_s": 0}
POOL = {"name": "g", "model": "m", "engine": "sim", "resources": {"cpus": 1}}
ARGS = {"generators": [{**POOL, "rollout": ROLLOUT}]}
TOTALS = Totals(*[Figures(finished=100, lengths=100, tokens=100.0, squared_tokens=100.0)] * 2)


@pytest.fixture
def kv(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, bytes]:
    """Replace the GCS by a mapping."""
    stored: dict[bytes, bytes] = {}

    def get_many(keys: Any, timeout_s: float) -> list[bytes]:
        return [stored[key] for key in keys if key in stored]

    def delete(prefix: bytes) -> None:
        for key in [key for key in stored if key.startswith(prefix)]:
            del stored[key]

    def delete_one(key: bytes) -> None:
        stored.pop(key, None)

    def get_prefix(prefix: bytes, timeout_s: float) -> list[bytes]:
        return [value for key, value in stored.items() if key.startswith(prefix)]

    monkeypatch.setattr(
        ray_internals, "kv_put", lambda key, value, timeout_s: stored.update({key: value})
    )
    monkeypatch.setattr(ray_internals, "kv_get_many", get_many)
    monkeypatch.setattr(ray_internals, "kv_get_prefix", get_prefix)
    monkeypatch.setattr(ray_internals, "kv_delete", delete_one)
    monkeypatch.setattr(ray_internals, "kv_delete_prefix", delete)
    return stored


class Controller:
    """Serve's controller: the deployed configuration and the replicas."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, args: dict[str, Any]) -> None:
        self.config = ServeApplicationSchema(
            name=APP, import_path="deployments.app:build", args=args
        )
        self.other = ServeApplicationSchema(name="other", import_path="a:b", route_prefix="/o")
        self.deployments = {"generator-g": ("HEALTHY", 1)}
        self.num_applied = 0
        self.state = "RUNNING"
        for module in (rollouts, rollout_config):  # both read the deployed configuration
            monkeypatch.setattr(module, "read_serve_config", self.read)
        monkeypatch.setattr(rollout_config, "apply_serve_config", self.apply)

    @property
    def pool(self) -> dict[str, Any]:
        pool: dict[str, Any] = self.config.args["generators"][0]
        return pool

    async def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        deployments = {
            name: {
                "status": status,
                "target_num_replicas": num,
                "message": "no such file",
                "replicas": [
                    {"replica_id": f"{name}-{i}", "state": self.state} for i in range(num)
                ],
            }
            for name, (status, num) in self.deployments.items()
        }
        application = {"name": APP, "status": "RUNNING", "deployments": deployments}
        configs = {APP: self.config, "other": self.other}
        return configs, {"applications": {APP: application}, "target_capacity": None}

    async def apply(self, applications: list[Any], target_capacity: float | None) -> None:
        self.num_applied += 1
        assert {application.name for application in applications} == {APP, "other"}
        self.config = next(a for a in applications if a.name == APP)


class Handle:
    """Handle of the new version's deployment."""

    def __init__(self) -> None:
        self.status = 200
        self.checksums: dict[str, str] = {}
        self.asked: list[str] = []
        self.answer_call = SimpleNamespace(remote=self._answer)
        self.weights_checksum = SimpleNamespace(remote=self._checksum)

    def options(self, stream: bool) -> "Handle":
        return self

    async def _answer(self, id_: str, head: Any, body: bytes) -> AsyncIterator[Any]:
        self.asked.append(id_)
        yield ResponseHead(self.status, [])
        yield b"{}"

    async def _checksum(self, id_: str) -> str:
        return self.checksums.get(id_, "same")


class Decider(Rollouts):
    """Decider whose steps the test makes."""

    stop = Rollouts.__del__

    def __del__(self) -> None:  # type: ignore[override]
        pass


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    context = SimpleNamespace(app_name=APP)
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(rollouts, "log_with_serve", lambda: None)
    monkeypatch.setattr(rollouts, "free_resources", lambda: [{"CPU": 1.5}])
    monkeypatch.setattr(rollouts, "RayExporter", lambda registry: None)
    monkeypatch.setattr(Rollouts, "start_loop", lambda self: None)
    return Controller(monkeypatch, ARGS)


async def make_decider(handle: Handle, args: dict[str, Any] = ARGS) -> Any:
    decider: Any = Decider.__new__(Decider)
    await decider.__init__(parse(args), {"g": Handle(), "g@2": handle})
    return decider


async def advance(decider: Any, controller: Controller) -> RolloutState:
    """Decide once; Serve has started the wanted replicas by the next time."""
    await decider.advance()
    await asyncio.gather(*(check for r in decider.rollouts for check in r.checks.values()))
    state = store.read_state(APP, "g")
    assert state is not None
    controller.deployments["generator-g@2"] = ("HEALTHY", state.new_replicas)
    return state


async def test_a_rollout_survives_the_death_of_its_decider(
    kv: dict[bytes, bytes], controller: Controller
) -> None:
    handle = Handle()
    totals, states, decider = Totals(), [], None
    for number in range(10):
        # A new process makes every second decision.
        decider = decider if number % 2 else await make_decider(handle)
        states.append(await advance(decider, controller))
        totals = totals + TOTALS
        store.write_totals(APP, "g", "2", f"router-{number % 2}", totals)
        if states[-1].is_finished:
            break
    assert sorted({state.share for state in states}) == [0.0, 50.0, 100.0]
    assert states[-1].phase == "promoted"
    assert states[-1].checksum == "same"
    assert (states[0].room, states[0].replicas) == (1, 1)
    assert controller.num_applied == 0
    await (await make_decider(handle)).advance()
    assert controller.pool == {**POOL, "model": "n", "version": "2"}
    assert parse(controller.config.args).generators[0].rollout is None
    assert not [key for key in kv if key.startswith(b"rollout-totals")]


async def test_a_deployment_without_the_section_cancels_the_rollout(
    kv: dict[bytes, bytes], controller: Controller
) -> None:
    await advance(await make_decider(Handle()), controller)
    access = RolloutAccess(APP, ["g"])
    assert (await access.states())["g"].phase == "starting"
    await access.act("g", "pause")
    for rollout in (None, {**ROLLOUT, "version": "3"}, {**ROLLOUT, "model": "other"}):
        controller.config.args = {"generators": [{**POOL, "rollout": rollout}]}
        assert (await access.states())["g"].phase == "cancelled"
        with pytest.raises(NotFoundError):
            await access.act("g", "abort")


async def test_a_reused_version_is_another_rollout(
    kv: dict[bytes, bytes], controller: Controller
) -> None:
    earlier = RolloutState(version="2", model="m2", replicas=1, room=1, since=0, phase="promoted")
    store.write_state(APP, "g", earlier)
    state = await advance(await make_decider(Handle()), controller)
    assert (state.model, state.phase) == ("n", "starting")
    assert controller.num_applied == 0


async def test_a_rolled_back_configuration_is_as_before(
    kv: dict[bytes, bytes], controller: Controller
) -> None:
    decider = await make_decider(Handle())
    await advance(decider, controller)
    store.write_action(APP, "g", "2", "abort")
    assert (await advance(decider, controller)).phase == "rolled_back"
    await decider.advance()
    assert controller.pool == POOL


async def test_an_action_waits_until_its_effect_is_stored(
    kv: dict[bytes, bytes], controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    decider = await make_decider(Handle())
    await advance(decider, controller)
    store.write_action(APP, "g", "2", "pause")
    store.write_action(APP, "g", "2", "abort")
    store.write_action(APP, "g-chat", "2", "abort")
    write_state = store.write_state
    monkeypatch.setattr(store, "write_state", lambda *args: 1 / 0)
    await decider.advance()  # dies before the effect is stored
    monkeypatch.setattr(store, "write_state", write_state)
    assert (await advance(decider, controller)).phase == "rolled_back"
    assert store.read_action(APP, "g", "2") == "pause"
    assert store.read_action(APP, "g-chat", "2") == "abort"


async def test_the_configuration_waits_for_a_version_that_gave_way(
    kv: dict[bytes, bytes], controller: Controller
) -> None:
    decider = await make_decider(Handle())
    await advance(decider, controller)
    store.write_action(APP, "g", "2", "abort")
    await advance(decider, controller)
    controller.deployments["generator-g"] = ("UPSCALING", 1)
    controller.state = "STARTING"
    await decider.advance()
    assert controller.num_applied == 0
    controller.state = "RUNNING"
    await decider.advance()
    assert controller.num_applied == 1


@pytest.mark.parametrize("defect", ["prompt", "checksum", "start"])
async def test_a_version_that_is_not_ready_is_rolled_back(
    kv: dict[bytes, bytes], controller: Controller, defect: str
) -> None:
    handle = Handle()
    if defect == "prompt":
        handle.status = 500
    if defect == "checksum":
        handle.checksums["generator-g@2-0"] = "other"
    args = {"generators": [{**POOL, "rollout": {**ROLLOUT, "checksum": "a" * 64}}]}
    decider = await make_decider(handle, args if defect == "checksum" else ARGS)
    for _ in range(20):
        state = await advance(decider, controller)
        if state.is_finished:
            break
        if defect == "start":
            controller.deployments["generator-g@2"] = ("UNHEALTHY", 0)
    assert state.phase == "rolled_back"
    reasons = {"prompt": "status 500", "checksum": "checksum is other", "start": "no such file"}
    assert reasons[defect] in state.decisions[-1].reason


async def test_the_budget_limits_the_room(kv: dict[bytes, bytes], controller: Controller) -> None:
    config = {**ARGS, "budget": {"cpus": 1.5}}
    controller.deployments["router"] = ("HEALTHY", 1)
    state = await advance(await make_decider(Handle(), config), controller)
    assert state.room == 0
    assert (state.new_replicas, state.old_replicas) == (1, 0)


async def test_a_rollout_is_added_to_the_deployed_configuration(
    kv: dict[bytes, bytes], controller: Controller
) -> None:
    controller.config.args = {"generators": [dict(POOL)]}
    access = RolloutAccess(APP, ["g"])
    with pytest.raises(NotFoundError):
        await access.start("x", {"model": "n"})
    with pytest.raises(InvalidRequestError, match="ascend"):
        await access.start("g", {"model": "n", "canary": [50]})
    used = RolloutState(version="2", model="m2", replicas=1, room=1, since=0, phase="rolled_back")
    store.write_state(APP, "g", used)
    with pytest.raises(InvalidRequestError, match="`2` was used"):
        await access.start("g", {"model": "n", "version": "2"})
    assert controller.num_applied == 0
    version = await access.start("g", {"model": "n"})
    assert controller.pool["rollout"] == {"model": "n", "version": version}
    with pytest.raises(InvalidRequestError, match="in progress"):
        await start_rollout(APP, "g", {"model": "n", "version": "9"})
    with pytest.raises(NotFoundError):
        await access.act("g", "pause")


async def test_routers_follow_the_state_and_report_their_totals(kv: dict[bytes, bytes]) -> None:
    rollout = {"rollout": {"model": "n", "version": "2"}}
    async with gateway_world(generator=rollout) as world:
        store.write_state(
            APP, "gen", RolloutState(version="2", model="n", replicas=1, room=1, since=0, share=25)
        )
        sync = RolloutSync(APP, "r1", world.gateway.rollouts)
        await sync.start()
        await sync.close()
        assert (await metrics(world))["tandem_rollout_share_ratio", "gen"] == 0.25
        assert store.read_totals(APP, "gen", "2").old.finished == 0
        assert [key for key in kv if b"r1" in key]
