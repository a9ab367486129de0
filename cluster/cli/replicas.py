"""Replicas as the routers see them, from the data of ``/dashboard``."""

from collections.abc import Mapping
from typing import Any

from rich.table import Column, Table
from rich.text import Text

DashboardData = Mapping[str, Any]


def replica_table(data: DashboardData) -> Table:
    """Return a row with state and load for each replica."""
    table = Table(Column("replica", no_wrap=True), "model", "link", box=None, pad_edge=False)
    for title in ("in flight", "running", "waiting", "KV"):
        table.add_column(title, justify="right")
    for name, pool in data["pools"].items():
        for replica in pool["replicas"]:
            levels = (str(replica[key]) for key in ("ongoing", "running", "waiting"))
            text = ", ".join(filter(None, (replica["state"], condition(replica))))
            state = Text(text, style="" if text == "linked" else "yellow")
            table.add_row(replica["id"], name, state, *levels, share(replica["kv_cache"]))
    return table


def condition(replica: Mapping[str, Any]) -> str:
    """Return what the routers say of a replica; empty if it is in full use."""
    if replica.get("is_draining"):
        return "draining"
    circuit = replica.get("circuit", "closed")
    return "" if circuit == "closed" else f"circuit {circuit.replace('_', '-')}"


def share(value: float | None) -> str:
    """Return a share from 0 to 1 as a percentage."""
    return "–" if value is None else f"{value:.0%}"
