"""Starts the head of a local Ray cluster. Owns its log file; knows nothing of Serve."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.errors import StartError

START_TIMEOUT_S = 120.0
POLL_S = 0.05
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Head:
    """What is asked of Ray."""

    cluster: ClusterConfig
    environment: Mapping[str, str]
    log: Path
    ray_address: str
    """What other jobs' ``ray.init()`` connects to."""

    def start(self) -> None:
        """Start Ray and return when it runs.

        Raises:
            StartError: Ray gave up, with its last words, or took too long.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C in our terminal must reach us alone.
            process = subprocess.Popen(
                self._command(), env=dict(self.environment), stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_TIMEOUT_S
        while (status := process.poll()) is None:
            if time.monotonic() > deadline:
                raise StartError(f"Ray did not start within {START_TIMEOUT_S:.0f} s; {self._why()}")
            time.sleep(POLL_S)
        if status != 0:
            raise StartError(f"Ray did not start (exit status {status}); {self._why()}")

    def _command(self) -> list[str]:
        cluster = self.cluster
        options = {
            "node_ip_address": LOOPBACK,
            "gcs_server_port": cluster.ray_port,
            "num_cpus": num_cpus(cluster),
            "object_store_memory": int(cluster.object_store_memory_bytes),
            "include_dashboard": True,
            "dashboard_host": LOOPBACK,
            "dashboard_port": cluster.dashboard_port,
            "dashboard_agent_listen_port": 0,  # any free one
            "include_log_monitor": True,
            "ray_address": self.ray_address,
        }
        return [sys.executable, "-m", "cluster.launch.ray_main", json.dumps(options)]

    def _why(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{lines[-1].strip() if lines else 'it said nothing'} (log: {self.log})"


def num_cpus(cluster: ClusterConfig) -> int:
    """Ray's logical CPUs: as configured, else the machine's, and at least 2."""
    return cluster.num_cpus or max(2, os.cpu_count() or 1)
