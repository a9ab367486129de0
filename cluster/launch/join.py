"""Join of this machine to a running cluster (``tandem join``); a failed join is rolled back."""

import json
import os
import shutil
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cluster.config import parse
from cluster.config.file import ALL_ADDRESSES, IMPORT_PATH
from cluster.errors import ConfigError, StartError
from cluster.launch import auth, environment, ports, state
from cluster.launch.joiner import JoinerInput
from cluster.launch.private_files import write_private
from cluster.launch.serve_api import ServeApi
from cluster.launch.start import (
    Phases,
    StartObserver,
    StartResult,
    check_ports,
    clear_home,
    start_lock,
)
from cluster.launch.starter import HeadInfo
from cluster.launch.starter_process import node_params, run_starter
from cluster.launch.stop import stop
from cluster.link.handshake import uses_tls
from cluster.models.store import resolve

DEFAULT_RAY_PORT = 6379
CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class JoinOptions:
    """Cluster to join, and properties of this node."""

    head: str
    """Host, or host and port, of Ray on the head."""
    address: str | None = None
    """Address at which the other nodes reach this one. Default: that of the route to the head."""
    num_cpus: int | None = None
    """Logical CPUs. Default: the machine's cores, at least 2."""
    token_file: Path | None = None
    """File with the cluster's token. Default: from the environment, or stored before."""
    timeout_s: float = 120.0
    """Maximum duration, in seconds."""


def join(options: JoinOptions, home: Path, observe: StartObserver) -> StartResult:
    """Start Ray on this machine as a node of the cluster.

    Serve starts HTTP here together with the first replica on this node.

    Raises:
        StartError: a cluster runs here already, or the head does not respond or rejects this node.
    """
    phases = Phases(observe)
    with start_lock(home):
        phases.enter("checks")
        clear_home(home)
        if environment.uses_haproxy():
            check_ports(ports.haproxy_ports())
        if options.address is not None:
            ports.check_node_address(options.address)
        host, port = _split(options.head)
        route_address = _check_head(host, port)
        if not auth.store_token(os.environ, home, options.token_file):
            raise StartError(
                f"no token for the cluster. Copy {auth.token_file(home)} from the head to this "
                "machine, or pass --token-file, or set RAY_AUTH_TOKEN."
            )
        cluster_id = str(uuid.uuid4())
        node = _Node(home, cluster_id, f"{host}:{port}", options.address or route_address)
        try:
            joined = _start(node, options, phases)
        except BaseException:
            stop(home, drain_s=0)
            shutil.rmtree(environment.sockets_dir(cluster_id), ignore_errors=True)
            raise
    phases.end()
    return StartResult(joined, phases.seconds)


@dataclass(frozen=True, slots=True)
class _Node:
    home: Path
    cluster_id: str
    gcs_address: str
    address: str


def _split(head: str) -> tuple[str, int]:
    host, _, port = head.rpartition(":")
    if ":" in host:
        raise StartError(f"{head!r}: several nodes need IPv4 addresses; use HOST or HOST:PORT")
    if not host:
        return head, DEFAULT_RAY_PORT
    if not port.isdecimal():
        raise StartError(f"{head!r} is not the address of a head; use HOST or HOST:PORT")
    return host, int(port)


def _check_head(host: str, port: int) -> str:
    """Connect to Ray on the head; return this machine's address of the connection."""
    try:
        # Also if the name of the head has an IPv6 address.
        (*_, resolved), *_ = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
        with socket.create_connection((str(resolved[0]), port), CONNECT_TIMEOUT_S) as connection:
            address: str = connection.getsockname()[0]
    except OSError as error:
        raise StartError(
            f"no head responds at {host}:{port} ({error.strerror or error}). Start it with "
            f"`tandem up --head`, and let this machine connect to it."
        ) from None
    return address


def _start(node: _Node, options: JoinOptions, phases: Phases) -> state.ClusterState:
    haproxy = environment.uses_haproxy()
    if haproxy:
        environment.write_haproxy_wrapper(node.cluster_id)
    variables = environment.cluster_environment(
        os.environ, node.home, node.cluster_id, haproxy=haproxy, several_nodes=True
    )
    directory = os.environ.get("RAY_TMPDIR")
    request = JoinerInput(
        ray={
            **node_params(options.num_cpus),
            "gcs_address": node.gcs_address,
            "node_ip_address": node.address,
            # Ray's default is the directory of the head.
            "temp_dir": str(Path(directory) / "ray") if directory else None,
        }
    )
    deadline = time.monotonic() + options.timeout_s
    joined: state.ClusterState | None = None
    log = state.run_dir(node.home) / "join.log"
    try:
        for report in run_starter(request, variables, log, deadline):
            if head := cast("HeadInfo | None", report.get("head")):
                joined = _state(node, head, haproxy=haproxy)
                state.save(node.home, joined)
            elif report["phase"] != "done":
                phases.enter(report["phase"])
    except TimeoutError:
        raise StartError(f"Ray did not start within {options.timeout_s:g} s (log: {log})") from None
    assert joined is not None
    return joined


def _deployed_config(head: HeadInfo, home: Path) -> dict[str, Any]:
    """Return the Serve config that is deployed; while the head starts, the one of its start."""
    if uses_tls(os.environ):
        return head["serve"]  # the dashboard has no TLS, and the token must not be readable
    try:
        with ServeApi(head["dashboard_url"], auth.stored_token(home)) as api:
            config = api.deployed_config()
    except StartError:
        return head["serve"]
    is_ours = (each["import_path"] == IMPORT_PATH for each in config["applications"])
    return config if any(is_ours) else head["serve"]


def _check_models(serve_config: dict[str, Any]) -> None:
    """Raise StartError if this node lacks a model that replicas would load here."""
    for application in serve_config["applications"]:
        if application["import_path"] != IMPORT_PATH:
            continue
        for model in parse(application.get("args") or {}).model_files:
            try:
                resolve(model)
            except ConfigError as error:
                text = str(error).removeprefix("model: ")
                raise StartError(f"this node lacks a model of the cluster: {text}") from None


def _state(node: _Node, head: HeadInfo, *, haproxy: bool) -> state.ClusterState:
    if head["haproxy"] != haproxy:
        text = "with" if head["haproxy"] else "without"
        raise StartError(f"the head runs {text} HAProxy; set RAY_SERVE_ENABLE_HA_PROXY as there")
    # Ray starts meanwhile, so check the port first, before this node's own HAProxy has it.
    http_host = (head["serve"].get("http_options") or {}).get("host") or ALL_ADDRESSES
    setting = "http_options.port on the head"
    check_ports([ports.http_port(head["http_port"], setting, http_host)])
    serve = _deployed_config(head, node.home)
    _check_models(serve)
    config = state.run_dir(node.home) / "config-of-head.yaml"
    write_private(config, json.dumps(serve))  # JSON is YAML
    return state.ClusterState(
        cluster_id=node.cluster_id,
        application=head["application"],
        http_url=f"{head['http_scheme']}://{node.address}:{head['http_port']}",
        dashboard_url=head["dashboard_url"],
        ray_address=node.gcs_address,
        config_path=str(config),
        started_at=time.time(),
        is_head=False,
        address=node.address,
    )
