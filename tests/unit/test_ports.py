import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config import parse
from cluster.config.file import LoadedConfig
from cluster.errors import StartError
from cluster.launch import ports, processes
from cluster.launch.ports import Port
from cluster.launch.start import check_ports

LISTEN = (
    "import socket, time; s = socket.create_server(('127.0.0.1', 0)); "
    "print(s.getsockname()[1], flush=True); time.sleep(600)"
)


@pytest.fixture
def listener(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    variables = getattr(request, "param", {})
    process = subprocess.Popen(
        [sys.executable, "-c", LISTEN], env={**os.environ, **variables}, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    yield process, int(process.stdout.readline())
    process.kill()
    process.communicate()


def port(number: int) -> Port:
    return Port(number, "HTTP", "--set http_options.port=…")


def test_a_busy_port_names_its_process_and_the_remedy(
    listener: tuple[subprocess.Popen[bytes], int],
) -> None:
    process, number = listener
    (busy,) = ports.find_busy([port(number)])
    message = str(busy)
    assert f"port {number} (HTTP)" in message
    assert f"process {process.pid} ({sys.executable} -c import socket" in message
    assert "--set http_options.port=…" in message


@pytest.mark.parametrize(
    "listener",
    [{processes.CLUSTER_ID: "x", processes.HOME: "/elsewhere"}],
    indirect=True,
)
def test_another_tandem_cluster_is_named(listener: tuple[subprocess.Popen[bytes], int]) -> None:
    (busy,) = ports.find_busy([port(listener[1])])
    assert "another Tandem cluster" in str(busy)
    assert "TANDEM_HOME=/elsewhere tandem down" in str(busy)


def test_a_port_is_free_right_after_its_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", number))
        server.accept()[0].close()  # leaves a connection in TIME_WAIT
        client.close()
    assert ports.find_busy([port(number)]) == []


def test_an_invisible_process_belongs_to_another_user() -> None:
    assert "a process of another user" in str(ports.BusyPort(port(1), None))


def test_an_address_of_another_machine_is_named() -> None:
    found = [Port(1234, use, "--set p=…", "192.0.2.1") for use in ("Ray's GCS", "the dashboard")]
    with pytest.raises(StartError) as caught:
        check_ports(found)
    assert str(caught.value).startswith("192.0.2.1 is not an address of this machine")
    assert str(caught.value).endswith("choose another with --address.")
    assert str(caught.value).count("192.0.2.1") == 1


def test_urls_have_brackets_around_ipv6_addresses() -> None:
    assert [ports.url_host(host) for host in ("::1", "10.0.0.1", "a.b")] == [
        "[::1]",
        "10.0.0.1",
        "a.b",
    ]


def test_haproxy_ports_are_required_only_with_haproxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", "18404")
    monkeypatch.delenv("RAY_GRAFANA_HOST", raising=False)
    cluster = {"ray_port": 16379, "dashboard_port": 18265}
    config = parse({"generators": [{"name": "g", "model": "m"}], "cluster": cluster})
    loaded = LoadedConfig(Path("ray-config.yaml"), {}, "tandem", config, "127.0.0.1", 18000)
    with_it = {p.number for p in ports.required_ports(loaded, haproxy=True, monitoring=False)}
    without = {p.number for p in ports.required_ports(loaded, haproxy=False, monitoring=False)}
    watched = {p.number for p in ports.required_ports(loaded, haproxy=False, monitoring=True)}
    assert watched - without == {9090, 3000}
    monkeypatch.setenv("RAY_GRAFANA_HOST", "http://127.0.0.1:3000")  # runs already
    watched = {p.number for p in ports.required_ports(loaded, haproxy=False, monitoring=True)}
    assert watched - without == {9090}
    assert without == {18000, 16379, 18265}
    assert with_it - without == {8500, 18404, 9101}
