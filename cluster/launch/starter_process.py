"""Runs ``cluster.launch.starter`` or ``joiner`` as a child process and reads its reports."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.errors import StartError
from cluster.launch.joiner import JoinerInput
from cluster.launch.ports import LOOPBACK
from cluster.launch.redis import Redis
from cluster.launch.serve_api import reason
from cluster.launch.starter import StarterInput


def head_params(
    cluster: ClusterConfig, address: str | None, redis: Redis | None = None
) -> dict[str, Any]:
    """Return Ray's options for a head; ``address`` is None for a cluster on loopback."""
    host = address or LOOPBACK
    return {
        **node_params(cluster.num_cpus),
        "object_store_memory": int(cluster.object_store_memory_bytes),
        "node_ip_address": host,
        "gcs_server_port": cluster.ray_port,
        "include_dashboard": True,
        "dashboard_host": host,
        "dashboard_port": cluster.dashboard_port,
        **(redis.ray_params() if redis else {}),
    }


def node_params(num_cpus: int | None) -> dict[str, Any]:
    """Return Ray's options that heads and other nodes share."""
    return {
        "num_cpus": num_cpus or default_cpus(),
        "dashboard_agent_listen_port": 0,  # a free port
        "include_log_monitor": True,
    }


def default_cpus() -> int:
    """Return the machine's cores, at least 2."""
    return max(2, os.cpu_count() or 1)


def run_starter(
    request: StarterInput | JoinerInput, environment: Mapping[str, str], log: Path, deadline: float
) -> Iterator[dict[str, Any]]:
    """Start the process, which writes to ``log``, and yield its reports as they arrive.

    Raises:
        StartError: Ray or Serve could not be started; includes the last line of the log.
        TimeoutError: ``deadline`` (of ``time.monotonic``) has passed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    receiving, sending = os.pipe()
    try:
        _spawn(request, environment, log, sending)
        for line in _lines(receiving, deadline):
            report = json.loads(line)
            if error := report.get("error"):
                raise StartError(f"Ray failed to start: {reason(error)} (log: {log})")
            yield report
            if report.get("phase") == "done":
                return
    finally:
        os.close(receiving)
    raise StartError(f"Ray failed to start: {last_line(log)} (log: {log})")


def _spawn(
    request: StarterInput | JoinerInput, environment: Mapping[str, str], log: Path, sending: int
) -> None:
    module = "cluster.launch.starter" if "serve" in request else "cluster.launch.joiner"
    command = [sys.executable, "-m", module, str(sending)]
    try:
        with log.open("wb") as output:
            # In a new session, so that Ctrl-C in this terminal does not reach it.
            process = subprocess.Popen(
                command, env=dict(environment), stdin=subprocess.PIPE, stdout=output,
                stderr=subprocess.STDOUT, pass_fds=(sending,), start_new_session=True,
            )  # fmt: skip
    finally:
        os.close(sending)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(json.dumps(request).encode())
    process.returncode = 0  # it ends by itself or with the cluster; avoids a ResourceWarning


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no output"


def _lines(channel: int, deadline: float) -> Iterator[bytes]:
    pending = b""
    while True:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0 or not select.select([channel], [], [], remaining_s)[0]:
            raise TimeoutError
        chunk = os.read(channel, 65536)
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        yield from lines
