"""The default cluster's engine in one process, without HTTP: the upper bound of a server."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.targets.home import Home, format_command, new_home
from benchmarks.token_times import TokenTimes

RESULT = "RESULT "
"""Start of each line that is a result; the others are vLLM's output."""
COMMAND = ("-m", "benchmarks.engine.worker")


@dataclass(frozen=True, slots=True)
class InProcessSender:
    """Sends prompts to the engine's process."""

    home: Home
    child: subprocess.Popen[str]

    def send(self, prompts: Sequence[str], concurrent: int) -> TokenTimes:
        """Generate for all prompts, ``concurrent`` at a time."""
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps([list(prompts), concurrent]) + "\n")
        self.child.stdin.flush()
        return TokenTimes(**self.read_result())

    def check(self, prompt: str) -> None:
        """Do nothing: the process checks the tokens of every response."""

    def read_result(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if line.startswith(RESULT):
                found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
                return found
        return self.home.fail(f"{self.child.args!r} exited with {self.child.wait()}.")


@contextlib.contextmanager
def start_engine(model: str) -> Iterator[tuple[InProcessSender, float, str]]:
    """Yield a sender, the seconds from the start to the first token, and the command line."""
    with new_home("engine") as home, home.log.open("w") as log:
        began = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, *COMMAND, model],
            env=home.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        with child:
            try:
                sender = InProcessSender(home, child)
                sender.read_result()
                yield (
                    sender,
                    time.monotonic() - began,
                    format_command((sys.executable, *COMMAND, model), {}),
                )
            finally:
                child.kill()
