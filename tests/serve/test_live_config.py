"""Changes of the configuration that running routers and replicas take over."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from cluster.config import TandemConfig, parse
from cluster.errors import EngineDeadError
from cluster.key_file import KeyFile
from deployments import app
from deployments import router as router_module
from tests import asgi
from tests.serve.deployment_kit import (
    COMPLETION,
    POOL,
    completion_body,
    make_config,
    open_completion,
    replace_ray,
    running_generator,
    running_router,
)
from tests.serve.gateway_kit import CHAT, World, gateway_world, metrics
from tests.serve.link_kit import read_all

BODY = {"model": "gen", "messages": [{"role": "user", "content": "Hi"}]}
KEY = "a key"


def with_changes(config: TandemConfig, **sections: dict[str, Any]) -> TandemConfig:
    """Return a configuration with other fields, of pools those of the first one of its kind."""
    fields = config.model_dump(mode="json")
    for name, changes in sections.items():
        section = fields[name][0] if name in ("generators", "classifiers") else fields[name]
        section |= changes
    return parse(fields)


def change(world: World, key_file: KeyFile | None = None, **sections: dict[str, Any]) -> None:
    config = with_changes(world.config, **sections)
    world.gateway.reconfigure(config, key_file, needs_keys=False)


async def ask(world: World, key: str = "", **fields: Any) -> asgi.Answer:
    return await asgi.call(world.app, "POST", CHAT, {**BODY, **fields}, headers={"x-api-key": key})


async def test_a_higher_limit_starts_queued_requests_and_interrupts_none() -> None:
    async with gateway_world() as world:
        replica = await world.add("gen", "gen-1")
        calls = [asgi.start(world.app, "POST", CHAT, {**BODY, "wait_before": 1}) for _ in range(3)]
        await world.until(lambda: len(replica.seen) == 2)
        change(world, generators={"max_in_flight": 3})
        await world.until(lambda: len(replica.seen) == 3)
        change(world, generators={"max_in_flight": 1})
        replica.gate.set()
        assert [(await call.done()).status for call in calls] == [200, 200, 200]


async def test_a_changed_queue_limit_applies_to_new_requests() -> None:
    async with gateway_world(max_queued=1) as world:
        queued = asgi.start(world.app, "POST", CHAT, BODY)
        await world.until(lambda: world.gateway.pools["gen"].num_queued == 1)
        assert (await ask(world)).status == 429
        change(world, router={"queue_timeout_s": 0.05, "max_queued": 8})
        assert (await ask(world)).status == 503  # it was queued
        await world.add("gen", "gen-1")
        assert (await queued.done()).status == 200


async def test_aliases_follow_the_configuration() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        assert (await ask(world, model="gpt-4o")).status == 404
        change(world, generators={"aliases": ["gpt-4o"]})
        assert (await ask(world, model="gpt-4o")).status == 200
        change(world)
        assert (await ask(world, model="gpt-4o")).status == 404


async def test_keys_are_replaced_at_once(tmp_path: Path) -> None:
    digest = sha256(KEY.encode()).hexdigest()
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        change(world, router={"api_keys_sha256": [digest]})
        assert (await ask(world)).status == 401
        assert (await ask(world, key=KEY)).status == 200
        file = tmp_path / "keys.yaml"
        file.write_text(f"keys: [{{sha256: {digest}, tenant: t, models: [cls]}}]")
        key_file = KeyFile(file, expected=True)
        key_file.refresh()
        change(world, key_file)
        assert (await ask(world, key=KEY)).status == 403


async def test_the_routing_policy_is_replaced() -> None:
    async with gateway_world(routing="prefix") as world:
        for name in ("gen-1", "gen-2"):
            await world.add("gen", name)
        change(world, generators={"routing": "round-robin"})
        answers = [(await ask(world)).headers["x-engine"] for _ in range(4)]
        assert sorted(answers) == ["gen-1", "gen-1", "gen-2", "gen-2"]
        decisions = "tandem_routing_decisions_total"
        assert (await metrics(world))[decisions, "gen", "round-robin"] == 4


async def test_limits_of_requests_follow_the_configuration() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        large = {"filler": "x" * 2000}
        assert (await ask(world, **large)).status == 200
        change(world, router={"max_body_bytes": 1024})
        assert (await ask(world, **large)).status == 413
        change(world, router={"max_header_bytes": 1024})
        answer = await asgi.call(world.app, "POST", CHAT, BODY, headers={"x": "y" * 1024})
        assert answer.status == 431


async def test_objectives_follow_the_configuration() -> None:
    async with gateway_world() as world:
        name = "tandem_objective_seconds"
        before = (await metrics(world))[name, "gen", "ttft_p90"]
        change(world, generators={"slo": {"ttft_p90_s": 0.1, "itl_p90_s": None}})
        after = await metrics(world)
        assert after[name, "gen", "ttft_p90"] < before
        assert after[name, "gen", "itl_p90"] == float("inf")


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replace_ray(monkeypatch, tmp_path)


def user_configs(config: TandemConfig) -> dict[str, Any]:
    """Return what Serve passes to the replicas of each deployment."""
    pool = config.generators[0].model_dump(mode="json")
    return {"pool": pool, "operations": config.operations.model_dump(mode="json")}


@pytest.mark.usefixtures("without_ray")
async def test_a_replica_takes_over_changes_while_it_streams() -> None:
    config = make_config(sim={"hang_after_requests": 2}, accounting={"interval_s": 0.1})
    async with running_generator(config) as (replica, link):
        stream = open_completion(link, 30)
        await stream.read()
        changed = with_changes(
            config,
            generators={"aliases": ["other"], "stall_timeout_s": 0.1},
            accounting={"per_cpu_hour": 3600.0},
            router={"max_answer_s": 1},
            leaks={"sample_s": 5, "window_s": 50},
            idempotency={"keep_s": 5},
        )
        await replica.reconfigure(user_configs(changed))
        priced = link.open(COMPLETION, completion_body(30).replace(b'"g"', b'"other"'))
        hung = open_completion(link, 1)
        for each in (stream, priced):
            assert (await read_all(each)).rstrip().endswith(b"[DONE]")
        assert priced.usage is not None
        assert priced.usage.cost is not None
        with pytest.raises(EngineDeadError, match=r"0\.1 s"):
            await asgi.check_health_repeatedly(replica)
        hung.cancel()


@pytest.mark.usefixtures("without_ray")
async def test_a_router_takes_over_changes(tmp_path: Path) -> None:
    config = make_config(router={"replicas": {"min": 1, "max": 1}})
    async with running_router(config) as (router, link):
        http = router.__serve_build_asgi_app__()
        assert (await asgi.get(http, "/v1/models")).status == 200
        keys = tmp_path / "other-keys.yaml"
        keys.write_text(f"keys: [{{sha256: {sha256(KEY.encode()).hexdigest()}, tenant: t}}]")
        changed = with_changes(
            config, router={"keys_file": str(keys)}, generators={"aliases": ["b"]}
        )
        await router.reconfigure(changed.model_dump(mode="json"))
        assert (await asgi.get(http, "/v1/models")).status == 401
        models = await asgi.call(http, "GET", "/v1/models", headers={"x-api-key": KEY})
        assert [card["id"] for card in models.json()["data"]] == [POOL, "b"]
        assert link.connected


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.usefixtures("without_ray")
async def test_a_router_keeps_the_keys_of_the_cluster(
    monkeypatch: pytest.MonkeyPatch, *, is_open: bool
) -> None:
    """``serve deploy ray-config.yaml`` drops the setting that ``tandem up --head`` made."""
    digest = sha256(KEY.encode()).hexdigest()
    stored = f"keys: [{{sha256: {digest}, tenant: t}}]".encode()
    monkeypatch.setattr(router_module, "kv_get_many", lambda keys, timeout_s: [stored])
    config = make_config(router={"keys_in_cluster": True, "open": is_open})
    async with running_router(config) as (router, _):
        http = router.__serve_build_asgi_app__()
        for keys_in_cluster in (True, False):
            changed = with_changes(config, router={"keys_in_cluster": keys_in_cluster})
            await router.reconfigure(changed.model_dump(mode="json"))
            assert (await asgi.get(http, "/v1/models")).status == 401
            known = await asgi.call(http, "GET", "/v1/models", headers={"x-api-key": KEY})
            assert known.status == 200


@pytest.mark.usefixtures("without_ray")
async def test_an_open_router_rejects_requests_until_it_knows_whether_there_are_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(keys: object, timeout_s: float) -> list[bytes]:
        raise OSError("no answer")

    config = make_config(router={"open": True})
    with monkeypatch.context() as outage:
        outage.setattr(router_module, "kv_get_many", fail)
        async with running_router(config) as (router, _):
            http = router.__serve_build_asgi_app__()
            assert (await asgi.get(http, "/v1/models")).status == 401
    async with running_router(config) as (router, _):
        http = router.__serve_build_asgi_app__()
        assert (await asgi.get(http, "/v1/models")).status == 200


@pytest.mark.filterwarnings("ignore:.*metrics_interval_s:DeprecationWarning")
@pytest.mark.parametrize(
    ("changes", "replaced"),
    [
        (
            {"router": {"max_queued": 5}, "generators": {"aliases": ["x"], "routing": "session"}},
            set(),
        ),
        ({"generators": {"replicas": {"min": 1, "max": 4, "target_in_flight": 8}}}, set()),
        ({"generators": {"max_model_len": 100}}, {"generator-g"}),
        ({"accounting": {"energy": False}}, {"generator-g"}),
        ({"router": {"resources": {"cpus": 2}}}, {"router"}),
    ],
    ids=str,
)
def test_serve_replaces_the_replicas_of_changed_deployments_only(
    changes: dict[str, Any], replaced: set[str]
) -> None:
    from ray.serve._private.config import DeploymentConfig

    def versions(config: TandemConfig) -> dict[str, str]:
        router = app.build(config)._bound_deployment
        (pools,) = (arg for arg in router.init_args if isinstance(arg, dict))
        found = {}
        for deployment in (router, *(pool._bound_deployment for pool in pools.values())):
            built = deployment.options(name=deployment.name)._deployment_config
            built.version = "a hash of all arguments"  # as Serve does
            found[deployment.name] = DeploymentConfig.from_proto_bytes(
                built.to_proto_bytes()
            ).version
        return found

    config = make_config()
    before, after = versions(config), versions(with_changes(config, **changes))
    assert {name for name in before if before[name] != after[name]} == replaced
