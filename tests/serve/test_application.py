"""Options of the Serve application."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve._private import application_state
from ray.serve.generated.serve_pb2 import DeploymentConfig
from ray.serve.schema import LoggingConfig

from deployments import app

ARGS = {
    "generators": [{"name": "g", "model": "none", "engine": "sim"}],
    "classifiers": [{"name": "c", "model": "none"}],
}


@pytest.mark.parametrize(("router", "answer_s"), [({}, 3600), ({"max_answer_s": 90}, 90)])
def test_every_replica_may_finish_the_longest_answer_before_it_stops(
    router: dict[str, Any], answer_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts: dict[str, float] = {}

    def record(target: Any, *, name: str, **options: Any) -> Any:
        timeouts[name] = options["graceful_shutdown_timeout_s"]
        return deployment(target, name=name, **options)

    deployment = serve.deployment
    monkeypatch.setattr(serve, "deployment", record)
    app.build({**ARGS, "router": router})
    assert timeouts.keys() == {"router", "generator-g", "classifier-c"}
    for timeout_s in timeouts.values():
        assert answer_s < timeout_s <= answer_s + 60


def test_deployments_of_models_with_a_slash_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def record(target: Any, *, name: str, **options: Any) -> Any:
        names.append(name)
        return deployment(target, name=name, **options)

    deployment = serve.deployment
    monkeypatch.setattr(serve, "deployment", record)
    app.build({"classifiers": [{"name": "org/model:v1.5", "model": "none"}]})
    assert names == ["classifier-org--model:v1.5", "router"]


def build_options(monkeypatch: pytest.MonkeyPatch, args: dict[str, Any]) -> dict[str, Any]:
    """Return the options of each deployment by its name."""
    built: dict[str, Any] = {}

    def record(target: Any, *, name: str, **options: Any) -> Any:
        built[name] = options
        return deployment(target, name=name, **options)

    deployment = serve.deployment
    monkeypatch.setattr(serve, "deployment", record)
    app.build(args)
    return built


@pytest.mark.parametrize(
    ("gpus", "pipeline", "strategy"),
    [(1, 1, "STRICT_PACK"), (1, 2, "PACK"), (0, 1, "STRICT_PACK"), (0, 2, "STRICT_PACK")],
)
def test_only_a_pipeline_on_gpus_may_use_several_nodes(
    gpus: int, pipeline: int, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = {"name": "g", "model": "m", "resources": {"cpus": 1, "gpus": gpus}}
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": pipeline}
    options = build_options(monkeypatch, {"generators": [{**pool, **sizes}]})["generator-g"]
    assert options["placement_group_strategy"] == strategy
    bundle = {"CPU": 1.0, **({"GPU": 1.0} if gpus else {})}
    assert options["placement_group_bundles"] == [bundle] * 2 * pipeline


@pytest.mark.parametrize(
    ("gpus", "budget", "chosen", "surge"),
    [
        (0, None, None, 100),  # on CPUs, which are logical
        (1, 4, None, 0),  # four replicas on four GPUs leave no room
        (1, 5, None, 25),
        (1, 16, None, 100),
        (0.5, 3, None, 50),
        (1, None, None, 0),  # no cluster to ask
        (1, 4, 100, 100),
        (0, None, 0, 0),
    ],
)
def test_an_update_starts_no_more_replicas_than_fit(
    gpus: float,
    budget: int | None,
    chosen: int | None,
    surge: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replicas = {"min": 1, "max": 4, "max_surge_percent": chosen}
    pool = {"name": "g", "model": "m", "resources": {"gpus": gpus}, "replicas": replicas}
    args = {"generators": [pool], "budget": {"gpus": budget}}
    assert build_options(monkeypatch, args)["generator-g"]["max_surge_percent"] == surge


def built_versions(monkeypatch: pytest.MonkeyPatch, args: dict[str, Any]) -> dict[str, str]:
    """Return the version of each deployment that Serve's build task reports."""
    context = SimpleNamespace(
        runtime_env={}, get_runtime_env_string=lambda: "{}", get_job_id=lambda: "01000000"
    )
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(application_state, "configure_component_logger", lambda **options: None)
    build = application_state.build_serve_application._function
    arguments = ("deployments.app:build", "version of the application", "tandem", args)
    _, deployments, error = build(*arguments, LoggingConfig(), None, {}, {}, {})
    assert error is None
    return {
        deployment["deployment_name"]: DeploymentConfig.FromString(
            deployment["deployment_config_proto_bytes"]
        ).version
        for deployment in deployments
    }


def test_a_rollout_replaces_no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ARGS["generators"][0]
    before = built_versions(monkeypatch, ARGS)
    rollout = {"model": "n", "version": "2"}
    running = built_versions(monkeypatch, {**ARGS, "generators": [{**pool, "rollout": rollout}]})
    after = built_versions(monkeypatch, {**ARGS, "generators": [{**pool, **rollout}]})
    assert before.keys() == {"router", "generator-g", "classifier-c"}
    assert running.keys() == {*before, "generator-g@2", "rollouts"}
    assert after.keys() == {"router", "generator-g@2", "classifier-c"}
    for name in ("generator-g", "classifier-c"):
        assert running[name] == before[name]
    for name in ("generator-g@2", "classifier-c"):
        assert after[name] == running[name]
    assert len({before["router"], running["router"], after["router"]}) == 3
    changed = built_versions(monkeypatch, {**ARGS, "generators": [{**pool, "model": "x"}]})
    assert changed["generator-g"] != before["generator-g"]


def test_applications_get_the_first_suitable_models_and_other_ones_live(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = {**ARGS, "applications": {"max_calls": 4}}
    options = build_options(monkeypatch, args)
    pool = options["applications"]["user_config"]["pool"]
    assert (pool["generator"], pool["classifier"], pool["encoder"]) == ("g", "c", "c")
    assert pool["max_calls"] == 4
    before = built_versions(monkeypatch, args)
    chosen = {**args, "applications": {"generator": "g", "max_calls": 8}}
    assert built_versions(monkeypatch, chosen) == before
    moved = built_versions(monkeypatch, {**args, "applications": {"templates": "/etc/x"}})
    assert moved["applications"] != before["applications"]
    assert moved["generator-g"] == before["generator-g"]
