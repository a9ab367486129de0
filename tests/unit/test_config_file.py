import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import file as config_file
from cluster.config.file import load
from cluster.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def without_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip Serve's schema, which takes seconds to import; tests/cluster covers it."""
    monkeypatch.setattr(config_file, "_check_serve_level", lambda config: None)


def write(directory: Path, **changes: Any) -> Path:
    application = {
        "name": "tandem",
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": {
            "generators": [
                {"name": "one", "model": "m", "engine": "sim"},
                {"name": "v1.5", "model": "m", "engine": "sim"},
                {"name": "o/m.1:8b", "model": "m", "engine": "sim"},
            ]
        },
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": [application], **changes}))
    return path


def test_the_shipped_config_is_valid() -> None:
    loaded = load(ROOT / "ray-config.yaml")
    assert (loaded.application, loaded.http_host, loaded.http_port) == (
        "tandem",
        "127.0.0.1",
        8000,
    )
    pools = [*loaded.config.generators, *loaded.config.classifiers]
    assert [pool.name for pool in pools] == ["smollm2", "sentiment"]


def test_two_cpus_suffice_for_two_replicas_of_everything() -> None:
    config = load(ROOT / "ray-config.yaml").config
    parts = [*config.generators, *config.classifiers, config.router]
    assert all(part.replicas.max == 2 for part in parts)
    assert sum(part.replicas.max * part.resources.cpus for part in parts) <= 2


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("router.max_queued=7", lambda c: c.config.router.max_queued == 7),
        ("generators.one.replicas.max=4", lambda c: c.config.generators[0].replicas.max == 4),
        ("generators.1.replicas={max: 3}", lambda c: c.config.generators[1].replicas.max == 3),
        ("generators.v1.5.replicas.max=4", lambda c: c.config.generators[1].replicas.max == 4),
        ("generators.o/m.1:8b.model=n", lambda c: c.config.generators[2].model == "n"),
        ("generators.one.sim.seed=5", lambda c: c.config.generators[0].sim.seed == 5),
        (
            "generators.one.engine_args.x.y=[1]",
            lambda c: c.config.generators[0].engine_args == {"x": {"y": [1]}},
        ),
        ("generators.0.resources.custom.tpu=1", lambda c: c.config.generators[0].resources.custom),
        ("generators.one.dtype=float32", lambda c: c.config.generators[0].dtype == "float32"),
        ("generators=[{name: z, model: m}]", lambda c: c.config.generators[0].name == "z"),
        ("http_options.port=8001", lambda c: c.http_port == 8001),
        ("http_options.host=::1", lambda c: c.http_host == "::1"),
    ],
)
def test_set_changes_one_value(tmp_path: Path, override: str, read: Any) -> None:
    assert read(load(write(tmp_path), [override]))


def test_the_last_set_wins_and_is_in_the_serve_config(tmp_path: Path) -> None:
    loaded = load(write(tmp_path), ["router.max_queued=7", "router.max_queued=8"])
    assert loaded.serve_config["applications"][0]["args"]["router"] == {"max_queued": 8}


@pytest.mark.parametrize("override", ["max_ongoing=9", "max_in_flight=9"])
@pytest.mark.parametrize("in_file", ["max_ongoing", "max_in_flight"])
def test_set_accepts_deprecated_and_current_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, override: str, in_file: str
) -> None:
    pool = {"name": "one", "model": "m", "engine": "sim", in_file: 64}
    app = {"import_path": "deployments.app:build", "args": {"generators": [pool]}}
    path = write(tmp_path, applications=[app])
    loaded = load(path, [f"generators.one.{override}"])
    assert loaded.config.generators[0].max_in_flight == 9
    is_deprecated = "max_ongoing" in (in_file, override.partition("=")[0])
    assert ("max_ongoing is deprecated; use max_in_flight" in caplog.text) == is_deprecated


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rooter.max_queued=1", ["'rooter'", "did you mean 'router'"]),
        ("router.max_queue=1", ["'max_queue'", "did you mean 'max_queued'"]),
        ("generators.two.model=x", ["'two'", "allowed: one, v1.5, o/m.1:8b"]),
        ("generators.7.model=x", ["'7'", "allowed: one, v1.5, o/m.1:8b"]),
        ("generators.one.model.x=1", ["model is 'm'"]),
        ("http_options.prot=1", ["'prot'", "did you mean 'port'"]),
        ("http_options.port=99999", ["http_options.port", "99999", "1 to 65535"]),
        ("http_options.port=${PORT:-8000}", ["http_options.port: got '${PORT:-8000}'", "--set"]),
        ("http_options.port='8000'", ["got '8000'; it must be a number, not a string"]),
        ("http_options.port=http", ["http_options.port", "'http'", "1 to 65535"]),
        ("router.max_queued", ["path=value"]),
        ("=1", ["path=value"]),
        ("router.=1", ["path=value"]),
        ("router=[", ["'['", "not valid YAML"]),
        ("router={open: true, open: false}", ["duplicate key 'open'"]),
        ("router.max_queued=many", ["router.max_queued", "'many'"]),
        ("http_options.host=0.0.0.0", ["'0.0.0.0'", "API keys", "router.open=true"]),
        ("http_options.host=example.org", ["'example.org'", "API keys"]),
    ],
)
def test_errors_in_set_are_one_line(tmp_path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path), [override])
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_the_default_host_is_loopback(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, http_options={"port": 8001, "host": None}))
    assert loaded.serve_config["http_options"] == {"port": 8001, "host": "127.0.0.1"}
    assert load(write(tmp_path)).serve_config["http_options"] == {"host": "127.0.0.1"}


def test_the_autoscaling_policy_is_filled_in(tmp_path: Path) -> None:
    application = load(write(tmp_path)).serve_config["applications"][0]
    assert application["autoscaling_policy"] == config_file.AUTOSCALING_POLICY
    shipped = load(ROOT / "ray-config.yaml").serve_config["applications"][0]
    assert shipped["autoscaling_policy"] == config_file.AUTOSCALING_POLICY


@pytest.mark.parametrize(
    "override", ["api_keys_sha256=[%s]", "operator_keys_sha256=[%s]", "open=true"]
)
def test_other_addresses_are_allowed_with_an_api_key_or_if_open(
    tmp_path: Path, override: str
) -> None:
    override = override.replace("%s", hashlib.sha256(b"key").hexdigest())
    overrides = ["http_options.host=0.0.0.0", f"router.{override}"]
    assert load(write(tmp_path), overrides).http_host == "0.0.0.0"


def test_other_addresses_are_allowed_with_a_key_file_that_becomes_mandatory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    keys = tmp_path / "keys.yaml"
    keys.write_text("tenants: {a: {}}")
    with pytest.raises(ConfigError, match="tandem keys add"):
        load(write(tmp_path), ["http_options.host=0.0.0.0"])
    digest = hashlib.sha256(b"key").hexdigest()
    keys.write_text(f"keys: [{{sha256: {digest}, tenant: a}}]")
    loaded = load(write(tmp_path), ["http_options.host=0.0.0.0"])
    assert loaded.config.router.keys_file == str(keys)
    assert loaded.serve_config["applications"][0]["args"]["router"] == {"keys_file": str(keys)}
    keys.write_text("keys: 3")
    with pytest.raises(ConfigError, match=r"keys\.yaml: keys"):
        load(write(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nb: 2", ["line 2", "not valid YAML"]),
        ("a: 1\nb:\n  c: {d: 1}\n  e: 2\n  c: 3", [", line 5: duplicate key 'c'", "in line 3"]),
        ("a: {b: 1, b: 1}", [", line 1: duplicate key 'b'; it is also in line 1"]),
        ("\tx: 1", ["line 1", "not valid YAML"]),
        ("- 1", ["a mapping", "list"]),
        ("", ["a mapping", "NoneType"]),
        ("applications: 3", ["a list of applications"]),
        ("applications: []", ["exactly one with import_path 'deployments.app:build'", "found 0"]),
    ],
)
def test_errors_in_the_file_are_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load(tmp_path / "nowhere.yaml")


def test_a_directory_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)


def test_anchors_and_merges_are_not_duplicate_keys(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("""
applications:
  - import_path: deployments.app:build
    args:
      generators:
        - {name: one, model: m, engine: sim, replicas: &replicas {min: 1, max: 3}}
        - {name: two, model: m, engine: sim, replicas: {<<: *replicas, max: 2}}
""")
    pools = load(path).config.generators
    assert [pool.replicas.max for pool in pools] == [3, 2]
