"""A target's own directory, environment and processes; all of them end with it.

Every process carries the mark of ``cluster.launch.processes`` in its environment, so whatever a
target starts is found and ended, whoever its parent is by then: Ray's workers, HAProxy, vLLM's
engine cores.
"""

import contextlib
import os
import random
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from benchmarks.endpoint import Endpoint, TargetError
from cluster.launch import processes
from cluster.launch.stop import stop

ROOT = Path(__file__).parents[3]
POLL_S = 0.05
LAST_WORDS = 15
"""Lines of its log that are shown of a target that failed."""


class Home:
    """A directory and a mark for the processes of one target."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cluster_id = str(uuid.uuid4())
        self.log = path / "log"
        self._children: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            processes.CLUSTER_ID: self.cluster_id,
            processes.HOME: str(path),
            # Ray retitles its processes; without this the title overwrites the mark.
            "SPT_NOENV": "1",
            # Ray on loopback alone, as Tandem's own.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}",
            "NO_COLOR": "1",
        }

    def spawn(
        self, *command: str | Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process of the target; what it says goes to ``log``."""
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                command,
                env={**self.environment, **(environment or {})},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in our terminal must reach us alone
            )
        self._children.append(child)
        return child

    def run(
        self,
        *command: str | Path,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Run a process of the target to its end.

        Raises:
            TargetError: it failed, or the time is over.
        """
        child = self.spawn(*command, environment=environment)
        try:
            status = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.fail(f"{child.args!r} took more than {timeout_s:g} s")
        if status:
            self.fail(f"{child.args!r} ended with {status}")

    def wait_ready(self, endpoint: Endpoint, timeout_s: float, path: str = "/v1/models") -> None:
        """Return once ``path`` answers with 200.

        Raises:
            TargetError: a process of the target failed, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while not endpoint.answers(path):
            for child in self._children:
                if child.poll():
                    self.fail(f"{child.args!r} ended with {child.returncode}")
            if time.monotonic() > deadline:
                self.fail(f"{endpoint.url}{path} did not answer within {timeout_s:g} s")
            time.sleep(POLL_S)

    def fail(self, problem: str) -> NoReturn:
        """Raise ``TargetError`` with the target's last words."""
        text = self.log.read_text("utf-8", "replace") if self.log.exists() else ""
        raise TargetError("\n".join([problem, *text.strip().splitlines()[-LAST_WORDS:]]))

    def end(self) -> None:
        """End every process that carries the mark."""
        stop(self.path, drain_s=0)
        for child in self._children:
            child.wait()


@contextlib.contextmanager
def new_home(name: str) -> Iterator[Home]:
    """A fresh home; its processes and its directory are gone afterwards, whatever happens."""
    with tempfile.TemporaryDirectory(prefix=f"bench-{name}-", ignore_cleanup_errors=True) as path:
        home = Home(Path(path))
        try:
            yield home
        finally:
            try:
                home.end()
            except KeyboardInterrupt:  # a second Ctrl-C
                home.end()
                raise


def free_ports(count: int) -> list[int]:
    """Ports that are free now.

    They are below those that Linux gives to clients' connections, one of which may otherwise take
    the port before it is listened on, and above those that Ray gives to its workers.
    """
    found: list[int] = []
    for port in random.sample(range(20_000, 32_768), 100 + count):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise TargetError(f"{count} free ports were not found")
