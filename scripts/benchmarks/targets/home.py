"""Directory, environment and processes of one target.

Every process carries the mark of ``cluster.launch.processes`` in its environment. The mark finds
processes whose parent has exited, such as Ray workers, HAProxy and vLLM's engine cores.
"""

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from benchmarks.endpoint import Endpoint, TargetError
from cluster.launch import processes
from cluster.launch.stop import stop
from cluster.models.store import home as cache

ROOT = Path(__file__).parents[3]
POLL_S = 0.05
LOG_LINES = 15
"""Last log lines of a failed target that are shown."""


class Home:
    """Directory and process mark of one target."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cluster_id = str(uuid.uuid4())
        self.log = path / "log"
        self.commands: list[str] = []
        """Command line of each process that was started, with its own environment variables."""
        self._children: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            processes.CLUSTER_ID: self.cluster_id,
            processes.HOME: str(path),
            # Ray renames its processes; without this, the title overwrites the mark.
            "SPT_NOENV": "1",
            # Keep Ray on loopback, as Tandem does.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}",
            "NO_COLOR": "1",
        }

    def spawn(
        self, *command: str | Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process of the target; its output goes to ``log``."""
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                command,
                env={**self.environment, **(environment or {})},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C must reach only this process
            )
        self._children.append(child)
        own = dict(set((environment or {}).items()) - set(self.environment.items()))
        shown = format_command(command, dict(sorted(own.items())))
        self.commands.append(shown.replace(str(self.path), "HOME"))
        return child

    def run(
        self,
        *command: str | Path,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Run a process of the target and wait until it exits.

        Raises:
            TargetError: It failed or did not exit within ``timeout_s``.
        """
        child = self.spawn(*command, environment=environment)
        try:
            status = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.fail(f"{child.args!r} did not exit within {timeout_s:g} s.")
        if status:
            self.fail(f"{child.args!r} exited with {status}.")

    def wait_ready(self, endpoint: Endpoint, timeout_s: float, path: str = "/v1/models") -> None:
        """Wait until ``path`` returns 200.

        Raises:
            TargetError: A process of the target failed, or ``timeout_s`` have passed.
        """
        deadline = time.monotonic() + timeout_s
        while not endpoint.returns_ok(path):
            for child in self._children:
                if child.poll():
                    self.fail(f"{child.args!r} exited with {child.returncode}.")
            if time.monotonic() > deadline:
                self.fail(f"{endpoint.url}{path} did not return 200 within {timeout_s:g} s.")
            time.sleep(POLL_S)

    def fail(self, problem: str) -> NoReturn:
        """Raise ``TargetError`` with the end of the target's log."""
        text = self.log.read_text("utf-8", "replace") if self.log.exists() else ""
        raise TargetError("\n".join([problem, *text.strip().splitlines()[-LOG_LINES:]]))

    def stop(self) -> None:
        stop(self.path, drain_s=0)
        for child in self._children:
            child.wait()


def format_command(command: Iterable[str | Path], environment: Mapping[str, str]) -> str:
    """Return a shell command, without the directories that differ between machines."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    line = " ".join([*variables, shlex.join(str(word) for word in command)])
    for directory, short in ((sys.prefix, ".venv"), (str(cache()), "~/.cache/tandem")):
        line = line.replace(directory, short)
    return line


@contextlib.contextmanager
def new_home(name: str) -> Iterator[Home]:
    """Yield a new home; stop its processes and delete its directory on exit."""
    with tempfile.TemporaryDirectory(prefix=f"bench-{name}-", ignore_cleanup_errors=True) as path:
        home = Home(Path(path))
        try:
            yield home
        finally:
            try:
                home.stop()
            except KeyboardInterrupt:  # a second Ctrl-C
                home.stop()
                raise
