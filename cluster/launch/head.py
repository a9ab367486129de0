"""Runs the starter and reads its reports. Owns the starter's process and its log file."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.errors import StartError
from cluster.launch.serve_api import reason

LOOPBACK = "127.0.0.1"


def ray_params(cluster: ClusterConfig) -> dict[str, Any]:
    """The head node's fields of Ray's ``RayParams``."""
    return {
        "node_ip_address": LOOPBACK,
        "gcs_server_port": cluster.ray_port,
        "num_cpus": num_cpus(cluster),
        "object_store_memory": int(cluster.object_store_memory_bytes),
        "include_dashboard": True,
        "dashboard_host": LOOPBACK,
        "dashboard_port": cluster.dashboard_port,
        "dashboard_agent_listen_port": 0,  # any free one
        "include_log_monitor": True,
    }


def num_cpus(cluster: ClusterConfig) -> int:
    """Ray's logical CPUs: as configured, else the machine's, and at least 2."""
    return cluster.num_cpus or max(2, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class Starter:
    """How ``cluster.launch.starter`` is run."""

    order: Mapping[str, Any]
    environment: Mapping[str, str]
    log: Path

    def reports(self, deadline: float) -> Iterator[dict[str, Any]]:
        """The starter's reports, as they come.

        Raises:
            StartError: Ray or Serve could not be started, with its last words.
            TimeoutError: ``deadline`` (of ``time.monotonic``) has come.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        receiving, sending = os.pipe()
        try:
            self._run(sending)
            for line in _lines(receiving, deadline):
                report = json.loads(line)
                if error := report.get("error"):
                    raise StartError(f"Ray could not be started: {reason(error)} (log: {self.log})")
                yield report
                if report.get("phase") == "done":
                    return
        finally:
            os.close(receiving)
        raise StartError(f"Ray could not be started; {self._last_words()}")

    def _run(self, sending: int) -> None:
        command = [sys.executable, "-m", "cluster.launch.starter", str(sending)]
        try:
            with self.log.open("wb") as log:
                # A session of its own: Ctrl-C in our terminal must reach us alone.
                process = subprocess.Popen(
                    command, env=dict(self.environment), stdin=subprocess.PIPE, stdout=log,
                    stderr=subprocess.STDOUT, pass_fds=(sending,), start_new_session=True,
                )  # fmt: skip
        finally:
            os.close(sending)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(json.dumps(self.order).encode())
        # It ends by itself or with the cluster; nobody waits for it.
        process.returncode = 0

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{lines[-1].strip() if lines else 'it said nothing'} (log: {self.log})"


def _lines(channel: int, deadline: float) -> Iterator[bytes]:
    pending = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([channel], [], [], left)[0]:
            raise TimeoutError
        chunk = os.read(channel, 65536)
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        yield from lines
