"""A target's own directory, environment and processes; all of them end with it.

Every process carries the mark of ``cluster.launch.processes`` in its environment, so whatever a
target starts is found and ended, whoever its parent is by then: Ray's workers, HAProxy, vLLM's
engine cores.
"""

import contextlib
import http.client
import os
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import TandemError
from cluster.launch import processes

ROOT = Path(__file__).parents[3]
GRACE_S = 5.0
POLL_S = 0.05


class TargetError(TandemError):
    """A server that is to be measured cannot be had, or answers wrongly."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server takes requests."""

    port: int
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)
    """What each request needs: an API key."""
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{self.host}:{self.port}"


class Home:
    """A directory and a mark for the processes of one target."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._children: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            processes.CLUSTER_ID: str(uuid.uuid4()),
            processes.HOME: str(path),
            # Ray retitles its processes; without this the title overwrites the mark.
            "SPT_NOENV": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}",
            "NO_COLOR": "1",
        }

    @property
    def log(self) -> Path:
        """What its processes said."""
        return self.path / "log"

    def spawn(
        self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process of the target; its words go to ``log``."""
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

    def wait_ready(self, endpoint: Endpoint, timeout_s: float, path: str = "/v1/models") -> None:
        """Return once ``path`` answers with 200.

        Raises:
            TargetError: a process ended, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while not _answers(endpoint, path):
            if ended := [child for child in self._children if child.poll() is not None]:
                self.fail(f"{ended[0].args!r} ended with {ended[0].returncode}")
            if time.monotonic() > deadline:
                self.fail(f"{endpoint.url}{path} did not answer within {timeout_s:g} s")
            time.sleep(POLL_S)

    def fail(self, problem: str) -> None:
        """Raise ``TargetError`` with the last words of the target."""
        text = self.log.read_text("utf-8", "replace") if self.log.exists() else ""
        words = "\n".join(text.strip().splitlines()[-15:])
        raise TargetError(f"{problem}\n{words}")

    def end(self) -> None:
        """End every process that carries the mark."""
        processes.end(self.path, grace_s=GRACE_S)
        for child in self._children:
            child.wait()


@contextlib.contextmanager
def home(name: str) -> Iterator[Home]:
    """A fresh home; its processes and its directory are gone afterwards, whatever happens."""
    with tempfile.TemporaryDirectory(prefix=f"tandem-bench-{name}-") as directory:
        made = Home(Path(directory))
        try:
            yield made
        finally:
            try:
                made.end()
            except KeyboardInterrupt:  # a second Ctrl-C
                processes.end(made.path, grace_s=0)
                raise


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _answers(endpoint: Endpoint, path: str) -> bool:
    connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=10)
    try:
        connection.request("GET", path, headers=dict(endpoint.headers))
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
