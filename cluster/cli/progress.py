"""What is shown while a cluster starts: a live table on a terminal, else one line a change."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from cluster.launch.serve_api import ApplicationStatus, DeploymentStatus, reason

WORDS = {
    "checks": "checking ports",
    "Ray": "starting Ray",
    "Serve": "starting Ray Serve",
    "application": "starting replicas",
    "dashboard": "waiting for the dashboard",
    "HTTP": "waiting for HTTP",
    "Prometheus": "starting Prometheus",
}


class StartProgress:
    """Shows the phases of a start and each deployment's replicas."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._spinner = Spinner("dots")
        self._phase = ""
        self._rows: dict[str, str] = {}
        self._said: dict[str, str] = {}
        self._live = Live(
            console=console, transient=True, refresh_per_second=8, get_renderable=self._table
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.__exit__(kind, error, trace)

    def show(self, phase: str, application: ApplicationStatus | None) -> None:
        """Show the current phase and, where there is one, the application's deployments."""
        deployments = application.deployments if application else ()
        self._phase = WORDS[phase]
        self._rows = {deployment.name: _words(deployment) for deployment in deployments}
        if self._console.is_terminal:
            return
        for name, words in {"start": self._phase, **self._rows}.items():
            if self._said.get(name) != words:
                self._said[name] = words
                seconds = time.monotonic() - self._began
                self._console.print(
                    f"{seconds:6.1f} s  {name}: {words}", highlight=False, soft_wrap=True
                )

    def _table(self) -> Table:
        """What Live draws, several times a second."""
        seconds = time.monotonic() - self._began
        self._spinner.update(text=f"{self._phase}, {seconds:.0f} s")
        table = Table.grid(padding=(0, 2))
        table.add_row(self._spinner)
        for name, words in self._rows.items():
            table.add_row(f"  {name}", words)
        return table


def _words(deployment: DeploymentStatus) -> str:
    words = f"{deployment.running}/{deployment.target} replicas"
    if not deployment.healthy and deployment.message:
        return f"{words}; {reason(deployment.message, limit=160)}"
    return words
