"""Parts of a cluster of several nodes that need neither Ray nor a network."""

import io
import logging
import os
import socket
import stat
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from cluster import key_file, ray_internals
from cluster.cli.app import app
from cluster.cli.lifecycle import head_address
from cluster.config import file as config_file
from cluster.errors import ConfigError, StartError
from cluster.key_file import ClusterKeys, KeyFile, lock_keys
from cluster.launch import auth, environment, join, processes, shared_keys, starter, state
from cluster.launch.processes import ClusterProcess
from cluster.ray_internals import LOOPBACK_VARIABLE

DIGEST = "a" * 64
APPLICATION = {
    "import_path": config_file.IMPORT_PATH,
    "args": {"generators": [{"name": "sim", "model": "sim", "engine": "sim"}]},
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (auth.MODE, auth.TOKEN, auth.TOKEN_PATH):
        monkeypatch.setenv(name, "")  # so that what commands set is removed at the end
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")  # whose ports a cluster here may use
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_new_token_is_readable_by_its_owner_only_and_stays(home: Path) -> None:
    assert not auth.store_token({}, home)
    auth.create_token(home)
    token = auth.ray_token({}, home)
    assert token is not None
    assert len(token) == 2 * auth.TOKEN_BYTES
    assert stat.S_IMODE(auth.token_file(home).stat().st_mode) == 0o600
    assert auth.store_token({}, home)
    assert auth.ray_token({}, home) == token


def test_a_token_from_a_file_or_the_environment_replaces_the_stored_one(home: Path) -> None:
    auth.create_token(home)
    home.with_name("copy").write_text("from-file\n")
    assert auth.store_token({}, home, home.with_name("copy"))
    assert auth.ray_token({}, home) == "from-file"
    assert auth.store_token({auth.TOKEN: "from-environment"}, home)
    assert auth.ray_token({}, home) == "from-environment"
    with pytest.raises(StartError, match="does not exist or contains no token"):
        auth.store_token({}, home, home.with_name("missing"))


def test_processes_of_several_nodes_require_the_stored_token(home: Path) -> None:
    base = {auth.TOKEN: "other", "PATH": "/bin", "RAY_ADDRESS": "1.2.3.4:6379"}
    found = environment.cluster_environment(base, home, "id", haproxy=False, several_nodes=True)
    assert found[auth.MODE] == "token"
    assert found[auth.TOKEN_PATH] == str(auth.token_file(home))
    assert found.keys().isdisjoint({auth.TOKEN, "RAY_ADDRESS"})
    assert found[LOOPBACK_VARIABLE] == "1"


def load(tmp_path: Path, host: str, address: str | None, **router: Any) -> config_file.LoadedConfig:
    args = {**APPLICATION["args"], "router": router}  # type: ignore[dict-item]
    application = {**APPLICATION, "args": args}
    content = {"http_options": {"host": host}, "applications": [application]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return config_file.load(path, address=address)


def test_every_node_serves_http_with_keys_from_the_cluster(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^on several nodes, .* are no API keys; add a key"):
        load(tmp_path, "127.0.0.1", "10.0.0.1")
    loaded = load(tmp_path, "127.0.0.1", "10.0.0.1", operator_keys_sha256=[DIGEST])
    assert loaded.http_host == "0.0.0.0"
    assert loaded.serve_config["proxy_location"] == "EveryNode"
    assert loaded.config.router.keys_in_cluster
    with pytest.raises(ConfigError, match="only one node can have"):
        load(tmp_path, "10.0.0.1", "10.0.0.1", operator_keys_sha256=[DIGEST])
    mounted = load(tmp_path, "0.0.0.0", "10.0.0.1", open=True, keys_file="/etc/keys.yaml")
    assert not mounted.config.router.keys_in_cluster
    assert load(tmp_path, "127.0.0.1", None).serve_config.get("proxy_location") is None


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1", "node-1", "2001:db8::1"])
def test_an_address_that_other_nodes_cannot_reach_is_rejected(home: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="--address: got"):
        head_address(address)
    with pytest.raises(ConfigError, match="--address: got"):
        join.join(join.JoinOptions("127.0.0.1:1", address), home, lambda *_: None)


def test_a_join_without_head_or_token_says_what_to_do(home: Path) -> None:
    observe = lambda phase, application: None  # noqa: E731
    with pytest.raises(StartError, match=r"no head responds at 127\.0\.0\.1:1 "):
        join.join(join.JoinOptions("127.0.0.1:1"), home, observe)
    with pytest.raises(StartError, match="use HOST or HOST:PORT"):
        join.join(join.JoinOptions("127.0.0.1:ray"), home, observe)
    with pytest.raises(StartError, match="need IPv4 addresses"):
        join.join(join.JoinOptions("2001:db8::1"), home, observe)


def free_port() -> int:
    with socket.create_server(("0.0.0.0", 0)) as server:
        return int(server.getsockname()[1])


def join_fake_head(
    home: Path, monkeypatch: pytest.MonkeyPatch, model: str, http_port: int
) -> state.ClusterState:
    """Join a head that accepts connections, with a child process that starts nothing."""
    pool = {"name": "a", "model": model}
    application = {"import_path": config_file.IMPORT_PATH, "args": {"generators": [pool]}}
    other = {"name": "other", "import_path": "other:app", "route_prefix": "/other"}
    router = {"keys_in_cluster": True}
    application["args"]["router"] = router  # type: ignore[index]
    head = {
        "application": "tandem",
        "http_port": http_port,
        "http_scheme": "https",
        "haproxy": environment.uses_haproxy(),
        "dashboard_url": "http://127.0.0.1:1",
        "head_timeout_s": None,
        "serve": {"http_options": {"host": "0.0.0.0"}, "applications": [other, application]},
    }
    reports = [{"phase": "Ray"}, {"head": head}, {"phase": "done"}]
    monkeypatch.setattr(join, "run_starter", lambda *_: iter(reports))
    auth.create_token(home)
    with socket.create_server(("127.0.0.1", 0)) as server:
        options = join.JoinOptions(f"127.0.0.1:{server.getsockname()[1]}")
        return join.join(options, home, lambda phase, application: None).state


def test_a_joined_node_has_the_configuration_of_its_head(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = join_fake_head(home, monkeypatch, str(tmp_path), http_port := free_port())
    assert state.load(home) == joined
    assert joined.http_url == f"https://127.0.0.1:{http_port}"
    assert stat.S_IMODE(Path(joined.config_path).stat().st_mode) == 0o600
    assert not joined.is_head
    loaded = config_file.load(Path(joined.config_path), address=joined.address)
    assert [pool.name for pool in loaded.config.generators] == ["a"]


def test_a_node_without_a_model_of_the_cluster_does_not_join(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StartError, match=r"this node lacks a model .*/missing"):
        join_fake_head(home, monkeypatch, str(tmp_path / "missing"), free_port())
    assert state.load(home) is None


def test_a_node_joins_the_configuration_that_is_deployed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = {"name": "updated", "model": str(tmp_path / "missing")}
    application = {"import_path": config_file.IMPORT_PATH, "args": {"generators": [pool]}}
    deployed = {"applications": [application]}
    monkeypatch.setattr(join.ServeApi, "deployed_config", lambda _: deployed)
    with pytest.raises(StartError, match=r"this node lacks a model .*/missing"):
        join_fake_head(home, monkeypatch, str(tmp_path), free_port())
    pool["model"] = str(tmp_path)
    joined = join_fake_head(home, monkeypatch, str(tmp_path), free_port())
    assert yaml.safe_load(Path(joined.config_path).read_text()) == deployed
    state.forget(home)
    monkeypatch.setenv("RAY_USE_TLS", "1")  # the dashboard has none
    joined = join_fake_head(home, monkeypatch, str(tmp_path), free_port())
    assert yaml.safe_load(Path(joined.config_path).read_text()) != deployed


def test_a_node_that_joined_leaves_before_it_joins_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.save(home, known(is_head=False))
    raylet = ClusterProcess(None, "raylet", "id")  # type: ignore[arg-type]
    monkeypatch.setattr(processes, "find", lambda _: [raylet])
    with pytest.raises(StartError, match=r"joined the cluster of 10\.0\.0\.1:6379 .* leave it"):
        join.join(join.JoinOptions("10.0.0.1"), home, lambda *_: None)


def test_a_node_whose_http_port_is_taken_does_not_join(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        with pytest.raises(StartError, match=rf"port {number} \(HTTP\) is in use"):
            join_fake_head(home, monkeypatch, str(tmp_path), number)


def known(*, is_head: bool) -> state.ClusterState:
    return state.ClusterState(
        "id", "tandem", "http://h", "http://d", "10.0.0.1:6379", "", 0.0, is_head=is_head
    )


def test_commands_use_the_token_of_the_cluster_that_runs(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The home may have one of an earlier cluster, and the environment one of another."""
    auth.create_token(home)
    several = replace(known(is_head=True), address="10.0.0.1")
    assert known(is_head=True).token(home) is None
    assert several.token(home) == auth.stored_token(home) is not None
    monkeypatch.setenv(auth.MODE, "token")
    monkeypatch.setenv(auth.TOKEN, "of the environment")
    assert known(is_head=True).token(home) == "of the environment"
    assert several.token(home) == auth.stored_token(home)
    monkeypatch.setenv(auth.TOKEN_PATH, "/none")
    state.save(home, several)
    shared_keys.prepare(home)
    assert auth.ray_token(os.environ) == auth.stored_token(home)


def test_a_head_lives_with_its_gcs_and_another_node_with_its_raylet() -> None:
    raylet = [ClusterProcess(None, "raylet", "id")]  # type: ignore[arg-type]
    assert not state.is_alive(raylet, known(is_head=True))
    assert state.is_alive(raylet, known(is_head=False))


def test_keys_are_changed_on_the_head(home: Path) -> None:
    shared_keys.prepare(home)
    state.save(home, known(is_head=False))
    with pytest.raises(ConfigError, match=r"run `tandem keys` on 10\.0\.0\.1$"):
        shared_keys.prepare(home)
    own = home.with_name("link.yaml")
    own.symlink_to(home / config_file.KEY_FILE)
    for options in ([], ["--file", str(home / config_file.KEY_FILE)], ["--file", str(own)]):
        done = CliRunner().invoke(app, ["keys", "add", "acme", *options])
        assert isinstance(done.exception, ConfigError)
    other = home.with_name("other.yaml")
    done = CliRunner().invoke(app, ["keys", "add", "acme", "--file", str(other)])
    assert done.exception is None


@pytest.fixture
def stored(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Texts that a running cluster of several nodes stores; ``[None]`` lets it fail once."""
    running = replace(known(is_head=True), address="10.0.0.1", keys_in_cluster=True)
    state.save(home, running)
    monkeypatch.setattr(shared_keys.processes, "find", lambda _: [running])
    contents: list[str | None] = []

    def write(address: str, key: bytes, value: bytes, timeout_s: float) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(key_file, "LOCK_TIMEOUT_S", 0.01)
            with pytest.raises(ConfigError, match="another process"):  # so this is the newest text
                lock_keys(home / config_file.KEY_FILE).__enter__()
        if contents == [None]:
            contents.clear()
            raise OSError("no answer")
        contents.append(value.decode())

    monkeypatch.setattr(ray_internals, "write_remote_kv", write)
    return contents


def keys(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments])


def test_keys_that_the_cluster_did_not_store_are_published_again(stored: list[str | None]) -> None:
    stored.append(None)
    failed = keys("add", "acme")
    assert "Run `tandem keys publish` once it responds" in str(failed.exception)
    assert stored == []
    assert "All nodes use the keys of" in keys("publish").stderr
    assert "acme" in (stored[-1] or "")
    stored[:] = [None]
    key = failed.stdout.strip()
    assert isinstance(keys("revoke", key).exception, StartError)
    repeated = keys("revoke", key)
    assert "no key matches" in str(repeated.exception)
    assert "sha256" not in (stored[-1] or "sha256")


def test_only_the_key_file_that_a_cluster_uses_is_published(
    home: Path, stored: list[str | None]
) -> None:
    link = home.with_name("link.yaml")
    link.symlink_to(home / config_file.KEY_FILE)
    assert keys("add", "linked", "--file", str(link)).exception is None
    assert link.is_symlink()
    assert "linked" in (stored[-1] or "")
    assert keys("add", "other", "--file", str(home.with_name("other.yaml"))).exception is None
    state.save(home, replace(known(is_head=True), address="10.0.0.1"))  # with router.keys_file
    assert keys("add", "mounted").exception is None
    assert len(stored) == 1
    assert "takes its keys from" in keys("publish").stderr


def test_a_key_that_is_revoked_during_the_start_is_revoked_in_the_cluster(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home / config_file.KEY_FILE
    path.parent.mkdir()
    path.write_text(f"keys: [{{sha256: {DIGEST}, tenant: acme}}]")
    stored: list[bytes] = []
    dashboard: Future[object] = Future()
    dashboard.set_result(None)
    controller = SimpleNamespace(get_serve_instance_details=None)
    monkeypatch.setattr(ray_internals, "kv_put", lambda key, value, _: stored.append(value))
    monkeypatch.setattr(starter, "_import_serve", lambda: None)
    monkeypatch.setattr(starter, "_start_ray", lambda _: dashboard)
    monkeypatch.setattr(starter, "_deploy", lambda _: controller)
    monkeypatch.setattr(starter, "wait_until_running", lambda *_: path.write_text("keys: []"))
    request: Any = {"key_file": str(path), "head": None, "serve": {}, "application": "a"}
    starter.main(request, io.StringIO())
    assert [DIGEST.encode() in text for text in stored] == [True, False]


def test_keys_of_the_cluster_survive_an_outage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(f"keys: [{{sha256: {DIGEST}, tenant: local}}]")
    stored: list[bytes | Exception | None] = [
        OSError("no answer"),
        None,
        b"keys: [{sha256: " + DIGEST.encode() + b", tenant: acme}]",
        OSError("no answer"),
        OSError("no answer"),
        b"keys: []",
    ]

    def read() -> bytes | None:
        found = stored.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    keys = ClusterKeys(read, KeyFile(file, expected=False))
    assert keys.required
    assert not keys.refresh()
    assert not keys.identities
    assert keys.required
    assert not keys.is_known
    assert keys.refresh()
    assert keys.is_known
    assert [identity.tenant.name for identity in keys.identities.values()] == ["local"]
    assert keys.refresh()
    assert keys.required
    assert [identity.tenant.name for identity in keys.identities.values()] == ["acme"]
    assert not keys.refresh()
    assert not keys.refresh()
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 2
    assert keys.identities
    assert keys.refresh()
    assert not keys.identities
    assert keys.required
