"""Real clusters for the tests: real Ray, real vLLM, the default models."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
import yaml

from cluster.models import store
from tests.running import ROOT as ROOT
from tests.running import TANDEM as TANDEM
from tests.running import RunningCluster as RunningCluster
from tests.running import isolated_home as isolated_home
from tests.running import wait_until as wait_until

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
LEAKS = {
    "sample_s": 0.5,
    "window_s": 10,
    "settle_s": 0,
    "min_bytes_per_s": 1024**2,
    "min_growth_bytes": "32MiB",  # more than a replica's first requests take
    "replace": True,
    "pause_s": 15,
}
"""Detection of leaks in ``sims``."""


def sim_generator(**fields: Any) -> dict[str, Any]:
    """Return a generator pool with the simulated engine, which needs almost no CPU."""
    return {
        "name": "sim",
        "model": "sim",
        "engine": "sim",
        "resources": {"cpus": 0.1},
        **fields,
    }


REPLAYED = sim_generator(
    name="replayed",
    sim={
        "prefill_s_per_token": 2e-4,
        "decode_s_per_token": 0.06,
        "batch_slowdown": 0.05,
        "max_num_seqs": 6,
    },
    max_in_flight=8,
    replicas={"min": 2, "max": 2},
)
"""Generator of ``sims`` to which ``test_simulation`` sends a trace."""


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run modules that use ``sims`` first and tests that use ``cluster`` last.

    Between its tests, a cluster takes time of the CPUs from others.
    """

    def uses(item: pytest.Item, fixture: str) -> bool:
        return fixture in getattr(item, "fixturenames", ())

    first = {item.path for item in items if uses(item, "sims")}
    items.sort(key=lambda item: 2 if uses(item, "cluster") else item.path not in first)


def link_models(home: Path) -> Path:
    """Let clusters with this home use the built models; return it."""
    store.models_dir().mkdir(parents=True, exist_ok=True)
    (home / "models").symlink_to(store.models_dir())
    return home


def wait_until_ready(http: httpx.Client) -> None:
    """Wait until the cluster is ready, which it is not while a router or an engine is replaced."""
    wait_until(
        lambda: http.get("/ready").status_code == 200,
        180,
        "becoming ready",
        ignored=(httpx.HTTPError,),
    )


@pytest.fixture(scope="session")
def make_cluster(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that starts an isolated cluster; only the models are shared."""

    def make(*args: str, config: dict[str, Any] | None = None, **variables: str) -> RunningCluster:
        home = link_models(tmp_path_factory.mktemp("home"))
        env, settings, http_url, ray_address = isolated_home(home, **variables)
        if config is not None:
            file = home / "test-config.yaml"
            file.write_text(yaml.safe_dump(config), encoding="utf-8")
            settings += ["--config", str(file)]
        running = RunningCluster(home, env, http_url, ray_address)
        running.up(*settings, *args)
        return running

    return make


@pytest.fixture(scope="module")
def sim_cluster(request: pytest.FixtureRequest, make_cluster: Any) -> Iterator[RunningCluster]:
    """Start a cluster with the configuration returned by the test module's ``config()``.

    ``ENVIRONMENT`` of the module, if there is one, is added to the environment.
    """
    variables = getattr(request.module, "ENVIRONMENT", {})
    running: RunningCluster = make_cluster(config=request.module.config(), **variables)
    yield running
    running.down()


@pytest.fixture(scope="session")
def sims(make_cluster: Any) -> Iterator[RunningCluster]:
    """Start simulated generators of several modules; a test of ``test_up_down`` crashes them."""
    abandoned = sim_generator(max_in_flight=32, sim={"decode_s_per_token": 0.02})
    leaking = sim_generator(
        name="leaking",
        sim={"decode_s_per_token": 0.02, "leak_bytes_per_request": "4MiB"},
        replicas={"min": 2, "max": 2},
    )
    hanging = sim_generator(name="org/hanging", sim={"hang_after_requests": 3}, stall_timeout_s=2)
    running: RunningCluster = make_cluster(
        config=serve_config(
            generators=[abandoned, leaking, hanging, REPLAYED],
            router=router_config(1),
            leaks=LEAKS,
        )
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


@pytest.fixture(scope="module")
def http(cluster: RunningCluster) -> Iterator[httpx.Client]:
    """Return a client of ``cluster``, once that is ready again after the tests before."""
    with httpx.Client(base_url=cluster.http_url, timeout=180) as client:
        wait_until_ready(client)
        yield client


@pytest.fixture(scope="module")
def client(cluster: RunningCluster) -> Iterator[openai.OpenAI]:
    """Return OpenAI's client of ``cluster``."""
    with openai.OpenAI(
        base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0, timeout=120
    ) as openai_client:
        yield openai_client


@pytest.fixture(scope="module")
def claude(cluster: RunningCluster) -> Iterator[anthropic.Anthropic]:
    """Return Anthropic's client of ``cluster``."""
    with anthropic.Anthropic(
        base_url=cluster.http_url, api_key="none", max_retries=0, timeout=120
    ) as anthropic_client:
        yield anthropic_client
