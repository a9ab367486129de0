"""``tandem status``."""

import dataclasses
import json
import time

from rich.console import Console
from rich.table import Column, Table

from cluster.launch.serve_api import DeploymentStatus, reason
from cluster.launch.state import ClusterStatus, read_status
from cluster.models.store import home


def run(*, as_json: bool) -> None:
    found = read_status(home())
    if as_json:
        details = {"running": found.alive, **dataclasses.asdict(found)} if found else None
        print(json.dumps(details or {"running": False}, indent=2))
    elif found is None:
        Console().print("No cluster is running.")
    else:
        _print(Console(), found)


def _print(console: Console, found: ClusterStatus) -> None:
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
    table.add_row("Ray jobs", f"RAY_ADDRESS={state.ray_address}")
    table.add_row("uptime", _duration(state.uptime_s))
    memory = f"{found.rss_bytes / 2**30:.1f} GiB (shared pages count in each)"
    table.add_row("processes", f"{found.num_processes}, {memory}")
    unknown = "unknown: Ray's dashboard does not respond (see `tandem doctor`)"
    table.add_row("application", application.status if application else unknown)
    console.print(table, highlight=False)
    if application:
        console.print(_deployments(application.deployments), highlight=False)
        for deployment in application.deployments:
            if not deployment.healthy and deployment.message:
                text = f"\n{deployment.name}: {reason(deployment.message)}"
                console.print(text, style="red", markup=False, highlight=False)


def _deployments(deployments: tuple[DeploymentStatus, ...]) -> Table:
    titles = ("deployment", "status", "replica", "state", "pid", "node", "uptime")
    columns = (Column(title, no_wrap=True) for title in titles)
    table = Table(*columns, box=None, pad_edge=False, collapse_padding=True)
    for deployment in deployments:
        first = (deployment.name, f"{deployment.status} {deployment.running}/{deployment.target}")
        for replica in deployment.replicas:
            uptime = _duration(time.time() - replica.started_at) if replica.started_at else ""
            pid, node = str(replica.pid or ""), replica.node_ip or ""
            table.add_row(*first, replica.id, replica.state, pid, node, uptime)
            first = ("", "")
        if not deployment.replicas:
            table.add_row(*first)
    return table


def _duration(seconds: float) -> str:
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole} s"
