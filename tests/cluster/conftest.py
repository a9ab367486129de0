"""Real clusters for the tests: real Ray, real vLLM, the default models."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from cluster.models import store
from tests.running import ROOT as ROOT
from tests.running import TANDEM as TANDEM
from tests.running import RunningCluster as RunningCluster
from tests.running import isolated_home as isolated_home

ALIASES, CLASSIFIER_ALIASES = ["gpt-4o-mini", "acme/chat:1b"], ["org/mood"]
"""Further names of the models in ``cluster``."""
GUARDS = [
    {
        "name": "personal-data",
        "patterns": ["card", "iban", "email", "phone"],
        "action": "redact",
        "default": False,
    },
    {
        "name": "tone",
        "classifier": "sentiment",
        "labels": ["NEGATIVE"],
        "threshold": 0.9,
        "action": "block",
        "checks": "prompt",
        "timeout_s": 60,
        "default": False,
    },
]
"""Guards of ``cluster``, for the requests that name them (docs/how-to/guards.md)."""


def sim_generator(**fields: Any) -> dict[str, Any]:
    """Return a generator pool with the simulated engine, which needs almost no CPU."""
    return {
        "name": "sim",
        "model": "sim",
        "engine": "sim",
        "resources": {"cpus": 0.1},
        **fields,
    }


def router_config(num: int, **fields: Any) -> dict[str, Any]:
    """Return a router configuration with a fixed number of replicas."""
    return {"replicas": {"min": num, "max": num}, "resources": {"cpus": 0.1}, **fields}


def serve_config(*more: dict[str, Any], **args: Any) -> dict[str, Any]:
    """Return a full configuration: Tandem's application with ``args``, and more applications."""
    application = {
        "name": "tandem",
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": args,
    }
    return {
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [application, *more],
    }


@pytest.fixture(scope="module", autouse=True)
def unchanged_environment() -> Iterator[None]:
    """Remove what vLLM writes into the environment, which later clusters would inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def make_cluster(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that starts an isolated cluster; only the models are shared."""

    def make(*args: str, **variables: str) -> RunningCluster:
        home = tmp_path_factory.mktemp("home")
        store.models_dir().mkdir(parents=True, exist_ok=True)
        (home / "models").symlink_to(store.models_dir())
        env, settings, http_url, ray_address = isolated_home(home, **variables)
        running = RunningCluster(home, env, http_url, ray_address)
        running.up(*settings, *args)
        return running

    return make


@pytest.fixture(scope="module")
def sim_cluster(
    request: pytest.FixtureRequest, make_cluster: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCluster]:
    """Start a cluster with the configuration returned by the test module's ``config()``.

    ``ENVIRONMENT`` of the module, if there is one, is added to the environment.
    """
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(yaml.safe_dump(request.module.config()), encoding="utf-8")
    running: RunningCluster = make_cluster(
        "--config", str(file), **getattr(request.module, "ENVIRONMENT", {})
    )
    yield running
    running.down()


@pytest.fixture(scope="session")
def cluster(make_cluster: Any) -> Iterator[RunningCluster]:
    """Start the default deployment (SmolLM2, the sentiment classifier, one router) and tasks."""
    aliases = {"generators.smollm2": ALIASES, "classifiers.sentiment": CLASSIFIER_ALIASES}
    settings = [f"--set={pool}.aliases={json.dumps(names)}" for pool, names in aliases.items()]
    running: RunningCluster = make_cluster(
        *settings, f"--set=guards={json.dumps(GUARDS)}", "--set=applications={}"
    )
    yield running
    running.down()
