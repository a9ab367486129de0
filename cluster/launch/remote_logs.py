"""Log files of all nodes, downloaded through Ray's dashboard."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import httpx

from cluster.errors import StartError

PATTERNS = ("serve/*", "worker-*")
"""Globs of the log files of routers, replicas and engines in Ray's log directory."""
MAX_LINES = 20_000
"""Lines from the end of each file."""
TIMEOUT_S = 30.0
NUM_THREADS = 8
_ALIVE = {"filter_keys": "state", "filter_predicates": "=", "filter_values": "ALIVE"}


def download_logs(dashboard_url: str, token: str | None, target: Path) -> list[str]:
    """Store the logs of each live node in a directory of ``target`` that has its address.

    Returns a line for each node whose logs cannot be read.

    Raises:
        StartError: The dashboard does not answer.
    """
    headers = {"authorization": f"Bearer {token}"} if token else {}
    problems = []
    with (
        httpx.Client(
            base_url=dashboard_url, headers=headers, timeout=TIMEOUT_S, trust_env=False
        ) as client,
        ThreadPoolExecutor(NUM_THREADS) as pool,
    ):
        for node in _live_nodes(client):
            download = partial(_download, client, node["node_id"], target / node["node_ip"])
            try:
                list(pool.map(download, _list_files(client, node["node_id"])))
            except (httpx.HTTPError, ValueError, KeyError) as error:
                problems.append(f"logs of node {node['node_ip']} cannot be read: {error}")
    return problems


def _live_nodes(client: httpx.Client) -> list[dict[str, Any]]:
    try:
        answer = client.get("/api/v0/nodes", params=_ALIVE)
        answer.raise_for_status()
        nodes: list[dict[str, Any]] = answer.json()["data"]["result"]["result"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise StartError(f"Ray's dashboard does not list the nodes: {error}") from None
    return nodes


def _list_files(client: httpx.Client, node_id: str) -> Iterator[str]:
    for pattern in PATTERNS:
        answer = client.get("/api/v0/logs", params={"node_id": node_id, "glob": pattern})
        answer.raise_for_status()
        for names in answer.json()["data"]["result"].values():
            yield from filter(_is_file_below, names)


def _is_file_below(name: str) -> bool:
    path = PurePosixPath(name)
    return not name.endswith("/") and not path.is_absolute() and ".." not in path.parts


def _download(client: httpx.Client, node_id: str, directory: Path, name: str) -> None:
    file = directory / name
    file.parent.mkdir(parents=True, exist_ok=True)
    params: dict[str, str | int] = {"node_id": node_id, "filename": name, "lines": MAX_LINES}
    with client.stream("GET", "/api/v0/logs/file", params=params) as answer, file.open("wb") as out:
        if answer.is_success:  # otherwise rotated away meanwhile, or empty
            for chunk in answer.iter_bytes():
                out.write(chunk)
