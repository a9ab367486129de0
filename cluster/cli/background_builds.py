"""Builds of default models while the cluster starts.

A process builds each model. A replica that needs a model waits for the lock of its build.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from rich.console import Console

from cluster.cli.models import missing_models
from cluster.config import TandemConfig
from cluster.errors import BuildError
from cluster.launch.processes import CLUSTER_ID
from cluster.launch.starter_process import last_line
from cluster.launch.state import run_dir
from cluster.models.build import is_building
from cluster.models.store import CATALOGUE, home, manifest

POLL_S = 0.05
END_S = 5.0
LOW_PRIORITY = 10  # niceness; at 19 a busy machine would never finish a build
BUILD = (sys.executable, "-c", "from cluster.cli import main; main()", "models", "build")


class BackgroundBuilds:
    """Processes that build the default models which ``config`` needs and this machine lacks.

    Classifiers, which are trained, leave most of the CPU time to the start of the cluster.
    """

    def __init__(self, config: TandemConfig, command: Sequence[str] = BUILD) -> None:
        self.names: Sequence[str] = missing_models(config)
        self._command = command
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        try:
            for name in self.names:
                self._processes[name] = self._start(name)
            while not all(is_building(n) or self._has_ended(n) for n in self.names):
                time.sleep(POLL_S)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def finish(self, console: Console) -> None:
        """Wait for the builds and print their results.

        Raises:
            BuildError: a build failed.
        """
        while self.check():
            time.sleep(POLL_S)
        for name in self.names:
            console.print(last_line(_log(name)), highlight=False, soft_wrap=True)

    def check(self) -> Mapping[str, str]:
        """Return the current step of each build that is running.

        Raises:
            BuildError: a build failed.
        """
        for name, process in self._processes.items():
            if process.poll() and manifest(CATALOGUE[name]) is None:
                reason = last_line(_log(name)).removeprefix("error: ")
                raise BuildError(f"cannot build {name!r}: {reason} (log: {_log(name)})")
        return {
            name: last_line(_log(name)).removeprefix(f"{name}: ")
            for name in self.names
            if not self._has_ended(name)
        }

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        log = _log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"{name}: starting\n")
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*self._command, name],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # With the id, the start would end this process as a leftover of a crash.
                env={key: value for key, value in os.environ.items() if key != CLUSTER_ID},
                start_new_session=True,  # Ctrl-C is for this process, which ends the builds
            )
        if CATALOGUE[name].kind == "classifier":
            os.setpriority(os.PRIO_PROCESS, process.pid, LOW_PRIORITY)
            with contextlib.suppress(OSError):  # Linux weighs sessions first, then processes
                Path(f"/proc/{process.pid}/autogroup").write_text(f"{LOW_PRIORITY}")
        return process

    def _has_ended(self, name: str) -> bool:
        return self._processes[name].poll() is not None

    def _end(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _log(name: str) -> Path:
    return run_dir(home()) / f"build-{name}.log"
