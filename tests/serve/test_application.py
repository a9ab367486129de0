"""Options of the Serve application."""

from typing import Any

import pytest
from ray import serve

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
