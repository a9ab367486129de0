"""The cluster file for ``ray up``, checked with Ray's own code and without a cloud."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts as ray_cli
from ray.serve.schema import ServeDeploySchema

from cluster.config import parse
from deployments import app
from tests.running import ROOT
from tests.serve.resources import place_all, replica_demands

FOLDER = ROOT / "deployments" / "ray-up"
PAGE = (ROOT / "docs" / "how-to" / "ray-up.md").read_text("utf-8")
SERVE_CONFIG = yaml.safe_load((FOLDER / "serve-config.yaml").read_text("utf-8"))
ARGS = SERVE_CONFIG["applications"][0]["args"]


def cluster_file() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / "aws.yaml").read_text("utf-8"))
    return content


def test_ray_accepts_the_cluster_file() -> None:
    prepared = prepare_config(cluster_file())
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu"]["max_workers"] == 4


def test_ray_rejects_an_unknown_field() -> None:
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config({**cluster_file(), "max_worker": 1}))


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_start_knows_the_options(commands: str) -> None:
    starts = [words for line in cluster_file()[commands] if "start" in (words := shlex.split(line))]
    assert len(starts) == 1
    ray_cli.start.make_context("start", starts[0][2:])  # parses and runs nothing


def test_the_serve_config_builds_and_needs_keys() -> None:
    config = ServeDeploySchema.model_validate(SERVE_CONFIG)
    assert (config.proxy_location, config.http_options.host) == ("EveryNode", "0.0.0.0")
    app.build(ARGS)
    router = parse(ARGS).router
    assert not router.open
    assert router.keys_file in cluster_file()["file_mounts"]


@pytest.mark.parametrize("count", ["min", "max"])
def test_all_replicas_fit_on_the_nodes(count: str) -> None:
    types = cluster_file()["available_node_types"]
    number = {"head": 1, "gpu": types["gpu"][f"{count}_workers"]}
    nodes = [dict(types[name]["resources"]) for name, many in number.items() for _ in range(many)]
    place_all(replica_demands(parse(ARGS), count), nodes)


def test_the_page_makes_every_mounted_file_that_is_not_in_the_repository() -> None:
    for source in cluster_file()["file_mounts"].values():
        assert (ROOT / source).exists() or source in PAGE
        assert (ROOT / source).exists() or Path(source).name in (FOLDER / ".gitignore").read_text()
