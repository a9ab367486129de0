"""``tandem adapters`` and ``tandem config diff`` against a cluster that applies changes at once."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import adapters, defaults, router_client
from cluster.cli.app import app
from cluster.config import file as config_file
from cluster.config import parse
from cluster.errors import TandemError
from cluster.launch import state
from cluster.launch.serve_api import ApplicationStatus

ARGS: dict[str, Any] = {
    "generators": [
        {"name": "chat", "model": "m", "adapters": {"law": "/law"}},
        {"name": "plain", "model": "m"},
    ]
}


class Cluster:
    """A deployed configuration, and replicas that cannot load the adapters in ``bad``."""

    def __init__(self) -> None:
        self.args = ARGS
        self.bad: dict[str, str] = {}
        self.shows_pools = True
        self.status, self.message = "RUNNING", ""
        self.num_loaded = 2

    # -- in place of ServeApi --

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def deployed_args(self, name: str) -> dict[str, Any]:
        assert name == "tandem"
        return self.args

    def deploy_args(self, name: str, args: Mapping[str, Any]) -> None:
        assert name == "tandem"
        self.args = dict(args)

    def application(self, name: str) -> ApplicationStatus:
        assert name == "tandem"
        return ApplicationStatus(name, self.status, self.message, ())

    # -- in place of the router's client --

    def get(self, path: str) -> Any:
        assert path == "/ready"
        pools = {
            pool.name: {
                "replicas": 2,
                "adapters": {
                    name: {"replicas": 0, "errors": [self.bad[name]]}
                    if name in self.bad
                    else {"replicas": self.num_loaded, "errors": []}
                    for name in pool.adapters
                },
            }
            for pool in parse(self.args).generators
        }
        return {"status": "ready", **({"pools": pools} if self.shows_pools else {})}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cluster:
    running = Cluster()

    @contextmanager
    def connect(url: str, key: str | None) -> Iterator[Cluster]:
        yield running

    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    addresses = ("http://h:1", "http://h:2", "h:3", "ray-config.yaml", 0.0)
    state.save(tmp_path, state.ClusterState("id", "tandem", *addresses))
    monkeypatch.setattr(defaults, "ServeApi", lambda *args: running)
    monkeypatch.setattr(router_client, "connect", connect)
    monkeypatch.setattr(config_file, "_check_serve_level", lambda config: None)
    return running


def run(*args: str) -> str:
    return CliRunner().invoke(app, args, catch_exceptions=False).stdout


def refused(*args: str) -> str:
    with pytest.raises(TandemError) as caught:
        run(*args)
    return str(caught.value)


def test_an_adapter_is_added_to_the_deployed_configuration(cluster: Cluster) -> None:
    shown = run("adapters", "add", "art", "/art", "--model", "chat")
    assert "art: /art" in shown
    chat, plain = parse(cluster.args).generators
    assert chat.adapters == {"law": "/law", "art": "/art"}
    assert plain.adapters == {}


def test_an_adapter_that_cannot_be_loaded_changes_nothing(cluster: Cluster) -> None:
    cluster.bad["art"] = "rank 64 exceeds 16"
    assert "rank 64 exceeds 16" in refused("adapters", "add", "art", "/art", "--model", "chat")
    assert cluster.args == ARGS


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_loaded": 1}, "for the adapter: 1 of 2 replicas serve it"),
        ({"status": "DEPLOYING"}, "for the adapter: the application is DEPLOYING"),
        ({"status": "DEPLOY_FAILED", "message": "no memory"}, "cannot apply .*: no memory"),
    ],
)
def test_an_adapter_that_is_not_served_in_time_changes_nothing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(adapters, "TIMEOUT_S", 0.0)
    monkeypatch.setattr(adapters, "POLL_S", 0.0)
    vars(cluster).update(fields)
    assert re.search(reason, refused("adapters", "add", "art", "/art", "--model", "chat"))
    assert cluster.args == ARGS


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["add", "art", "/art"], "set --model; generators: chat, plain"),
        (["add", "art", "/art", "--model", "none"], "No 'none'; generators: chat, plain"),
        (["add", "law", "/law", "--model", "chat"], "'law' exists already"),
        (["add", "chat", "/law", "--model", "chat"], "'chat' exists already"),
        (["add", "a b", "/law", "--model", "chat"], "a model name has letters"),
        (["add", "art", "/art", "--model", "plain"], "without support for adapters"),
        (["remove", "art"], "No adapter 'art'; known: law"),
        (["remove", "law"], "the last adapter of chat"),
    ],
)
def test_mistakes_are_refused(cluster: Cluster, arguments: list[str], reason: str) -> None:
    assert reason in refused("adapters", *arguments)
    assert cluster.args == ARGS


def test_an_operator_key_is_required(cluster: Cluster) -> None:
    cluster.shows_pools = False
    assert "operator key" in refused("adapters", "add", "art", "/art", "--model", "chat")
    assert cluster.args == ARGS


def test_adapters_are_listed_and_removed(cluster: Cluster) -> None:
    run("adapters", "add", "art", "/art", "--model", "chat")
    rows = json.loads(run("adapters", "list", "--json"))
    row = {"model": "chat", "replicas": 2, "errors": []}
    assert rows == [{"name": n, **row, "path": f"/{n}"} for n in ("law", "art")]
    assert "law" in run("adapters", "list")
    run("adapters", "remove", "art")
    assert parse(cluster.args) == parse(ARGS)


def test_the_difference_to_the_running_configuration_is_shown(
    cluster: Cluster, tmp_path: Path
) -> None:
    def diff(*generators: dict[str, Any], **args: Any) -> list[str]:
        application = {"name": "tandem", "import_path": config_file.IMPORT_PATH}
        application["args"] = {"generators": list(generators), **args}
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({"applications": [application]}))
        return run("config", "diff", "--config", str(file)).splitlines()

    chat, plain = ARGS["generators"]
    assert diff(chat, plain) == ["The running cluster has this configuration."]
    changed = diff(
        {**chat, "aliases": ["a"], "dtype": "float32"},
        {"name": "new", "model": "m"},
        router={"max_queued": 5},
        cluster={"ray_port": 7000},
    )
    assert changed == [
        "changes live: generators.chat.aliases",
        "changes live: router.max_queued",
        "replaces the replicas of generator-chat: generators.chat.dtype",
        "replaces the replicas of router: names of the pools",
        "adds generator-new",
        "removes generator-plain",
        "needs `tandem down` and `tandem up`: cluster.ray_port",
    ]
