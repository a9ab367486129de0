"""``tandem status``."""

import dataclasses
import json
import time
from collections.abc import Mapping

from rich.console import Console
from rich.table import Column, Table

from cluster.cli.replicas import condition, replica_table
from cluster.cli.router_client import DATA_PATH, connect
from cluster.errors import TandemError, UnavailableError
from cluster.launch.other_ray import read_other_status
from cluster.launch.serve_api import DeploymentStatus, reason
from cluster.launch.state import ClusterStatus, read_status
from cluster.models.store import home

ROUTER_TIMEOUT_S = 5.0

Conditions = Mapping[str, str]
"""Condition of each replica by its id, as the routers see it; empty if it is in full use."""


def run(key: str | None, *, as_json: bool) -> None:
    found = read_status(home())
    if found is None:
        # The key is for the URL that the user knows; this one comes from what runs here.
        found, key = read_other_status(), None
    conditions = _read_conditions(found, key)
    if as_json:
        details = (
            {"running": found.alive, **dataclasses.asdict(found), "conditions": conditions}
            if found
            else None
        )
        print(json.dumps(details or {"running": False}, indent=2))
    elif found is None:
        Console().print("No cluster is running.")
    else:
        _print(Console(), found, conditions or {})


def run_remote(url: str, key: str | None, *, as_json: bool) -> None:
    """Show what the routers of a cluster on other machines say.

    Raises:
        TandemError: No router responds, or the key is not an operator's.
    """
    with connect(url, key, timeout_s=ROUTER_TIMEOUT_S) as router:
        data = router.get(f"{DATA_PATH}?since={int(time.time())}")
        try:
            ready = bool(router.get("/ready"))
        except UnavailableError:  # a pool without a ready replica
            ready = False
    if as_json:
        found = {"url": url, "ready": ready, "routers": data["routers"], "pools": data["pools"]}
        print(json.dumps(found, indent=2))
        return
    console = Console(highlight=False)
    silent = [name for name, responds in data["routers"].items() if not responds]
    text = f", no response from {', '.join(silent)}" if silent else ""
    table = Table.grid(padding=(0, 2))
    table.add_row("HTTP", url)
    table.add_row("state", "ready" if ready else "not ready")
    table.add_row("routers", f"{len(data['routers'])}{text}")
    console.print(table, markup=False)
    console.print(replica_table(data))


def _read_conditions(found: ClusterStatus | None, key: str | None) -> Conditions | None:
    """Return the conditions of all replicas; None if no router tells."""
    if found is None or not found.alive or found.state is None:
        return None
    try:
        with connect(found.state.http_url, key, timeout_s=ROUTER_TIMEOUT_S) as router:
            data = router.get(f"{DATA_PATH}?since={int(time.time())}")
    except TandemError:
        return None
    pools = data["pools"].values()
    return {replica["id"]: condition(replica) for pool in pools for replica in pool["replicas"]}


def _print(console: Console, found: ClusterStatus, conditions: Conditions) -> None:
    if not found.alive or found.state is None:
        text = f"The cluster has crashed, leaving {found.num_processes} processes."
        console.print(f"{text} Clean up with `tandem down`.", style="red")
        return
    state, application = found.state, found.application
    table = Table.grid(padding=(0, 2))
    table.add_row("HTTP", state.http_url)
    table.add_row("dashboard", state.dashboard_url)
    if state.prometheus_url:
        table.add_row("Prometheus", state.prometheus_url)
    if state.grafana_url:
        stand_in = " (stand-in for Grafana)" if state.grafana_is_stand_in else ""
        table.add_row("charts", f"{state.grafana_url}{stand_in}")
    table.add_row("Ray jobs", f"RAY_ADDRESS={state.ray_address}")
    table.add_row("uptime", _duration(state.uptime_s))
    if found.num_processes:
        memory = f"{found.rss_bytes / 2**30:.1f} GiB (shared pages count in each)"
        where = "" if state.address is None else " on this node"
        table.add_row("processes", f"{found.num_processes}{where}, {memory}")
    unknown = "unknown: Ray's dashboard does not respond (see `tandem doctor`)"
    table.add_row("application", application.status if application else unknown)
    console.print(table, highlight=False)
    if application:
        console.print(_deployments(application.deployments, conditions), highlight=False)
        for deployment in application.deployments:
            if not deployment.healthy and deployment.message:
                text = f"\n{deployment.name}: {reason(deployment.message)}"
                console.print(text, style="red", markup=False, highlight=False)


def _deployments(deployments: tuple[DeploymentStatus, ...], conditions: Conditions) -> Table:
    titles = ("deployment", "status", "replica", "state", "pid", "node", "uptime")
    columns = (Column(title, no_wrap=True) for title in titles)
    table = Table(*columns, box=None, pad_edge=False, collapse_padding=True)
    for deployment in deployments:
        first = (deployment.name, f"{deployment.status} {deployment.running}/{deployment.target}")
        for replica in deployment.replicas:
            uptime = _duration(time.time() - replica.started_at) if replica.started_at else ""
            pid, node = str(replica.pid or ""), replica.node_ip or ""
            state = ", ".join(filter(None, (replica.state, conditions.get(replica.id))))
            table.add_row(*first, replica.id, state, pid, node, uptime)
            first = ("", "")
        if not deployment.replicas:
            table.add_row(*first)
    return table


def _duration(seconds: float) -> str:
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole} s"
