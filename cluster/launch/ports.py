"""Ports that a cluster needs, and the processes that occupy them."""

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from cluster.config.file import LoadedConfig
from cluster.errors import ConfigError
from cluster.launch import processes

LOOPBACK = "127.0.0.1"
USERS_GRAFANA = "RAY_GRAFANA_HOST"
"""Variable with the address of the user's own Grafana; then none is started."""


@dataclass(frozen=True, slots=True)
class Port:
    """Port that the cluster listens on."""

    number: int
    use: str
    """Purpose, for messages."""
    setting: str
    """Option or variable that changes the port."""
    host: str = LOOPBACK
    host_setting: str = "--address"
    """Option that changes the host."""


@dataclass(frozen=True, slots=True)
class BusyPort:
    """Port that a process listens on already, or whose host is not an address of this machine."""

    port: Port
    process: psutil.Process | None
    """None if the process belongs to another user."""
    lacks_host: bool = False

    def __str__(self) -> str:
        if self.lacks_host:
            return (
                f"{self.port.host} is not an address of this machine (`ip addr` lists them); "
                f"choose another with {self.port.host_setting}."
            )
        owner = "a process of another user"
        advice = "End it"
        if self.process is not None:
            owner = f"process {self.process.pid} ({processes.command(self.process)})"
            if home := processes.environment_of(self.process.pid).get(processes.HOME):
                owner = f"another Tandem cluster, {owner}"
                advice = f"Stop it with `TANDEM_HOME={home} tandem down`"
            elif self.process.name() == "gcs_server":
                owner = f"a Ray cluster not started by Tandem, {owner}"
                advice = "Stop it with `ray stop`"
        return (
            f"port {self.port.number} ({self.port.use}) is in use by {owner}. "
            f"{advice}, or choose another port with {self.port.setting}."
        )


def required_ports(
    loaded: LoadedConfig, *, haproxy: bool, monitoring: bool, address: str = LOOPBACK
) -> list[Port]:
    """Return the fixed ports of a head; Ray and Serve choose further, free ones."""
    cluster = loaded.config.cluster
    ports = [
        http_port(loaded.http_port, "--set http_options.port=…", loaded.http_host),
        Port(cluster.ray_port, "Ray's GCS", "--set cluster.ray_port=…", address),
        Port(cluster.dashboard_port, "the dashboard", "--set cluster.dashboard_port=…", address),
    ]
    if haproxy:
        fallback = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
        ports += [_from_variable(fallback, 8500, "Serve's fallback proxy"), *haproxy_ports()]
    if monitoring:
        ports.append(Port(cluster.prometheus_port, "Prometheus", "--set cluster.prometheus_port=…"))
        if USERS_GRAFANA not in os.environ:
            ports.append(Port(cluster.grafana_port, "charts", "--set cluster.grafana_port=…"))
    return ports


def http_port(number: int, setting: str, host: str) -> Port:
    """Return the port of the HTTP API."""
    return Port(number, "HTTP", setting, host, "--set http_options.host=…")


def haproxy_ports() -> list[Port]:
    """Return the further ports of the HAProxy of each node."""
    return [
        _from_variable("RAY_SERVE_HAPROXY_STATS_PORT", 8404, "HAProxy's statistics"),
        _from_variable("RAY_SERVE_HAPROXY_METRICS_PORT", 9101, "HAProxy's metrics"),
    ]


def _from_variable(variable: str, default: int, use: str) -> Port:
    return Port(int(os.environ.get(variable, default)), use, f"the environment variable {variable}")


def find_busy(ports: Iterable[Port]) -> list[BusyPort]:
    """Return the ports that cannot be used."""
    found = ((port, _try_to_listen(port)) for port in ports)
    return [
        BusyPort(port, None, lacks_host=True)
        if error == errno.EADDRNOTAVAIL
        else BusyPort(port, _listener(port.number))
        for port, error in found
        if error
    ]


def check_node_address(address: str) -> None:
    """Raise if other nodes cannot reach this address.

    Raises:
        ConfigError: it is no IPv4 address, or one of loopback or all addresses.
    """
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        raise ConfigError(f"--address: got {address!r}; it must be an IP address") from None
    if found.is_loopback or found.is_unspecified:
        raise ConfigError(f"--address: got {address}, which other nodes cannot reach")
    if found.version != 4:
        raise ConfigError(f"--address: got {address}; several nodes need IPv4 addresses")


def url_host(host: str) -> str:
    """Return the host for a URL, with brackets around an IPv6 address."""
    return f"[{host}]" if ":" in host else host


def _try_to_listen(port: Port) -> int:
    """Return the error number if nothing can listen on the port, or 0."""
    family = socket.AF_INET6 if ":" in port.host else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        # Otherwise a port would be in use for a minute after its last connection (TIME_WAIT).
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((port.host, port.number))
            probe.listen(1)
        except OSError as error:
            return error.errno or errno.EADDRINUSE
    return 0


def _listener(number: int) -> psutil.Process | None:
    for connection in psutil.net_connections("tcp"):
        if connection.status != psutil.CONN_LISTEN or connection.pid is None:
            continue
        if connection.laddr and connection.laddr.port == number:
            with contextlib.suppress(psutil.NoSuchProcess):
                return psutil.Process(connection.pid)
    return None
