"""Progress of a cluster start: a live table on a terminal, otherwise a line per change."""

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from cluster.launch.serve_api import ApplicationStatus, DeploymentStatus, reason

PHASE_TEXTS = {
    "checks": "checking ports",
    "Ray": "starting Ray",
    "Serve": "starting Ray Serve",
    "application": "starting replicas",
    "dashboard": "waiting for the dashboard",
    "HTTP": "waiting for HTTP",
    "Prometheus": "starting Prometheus",
    "charts": "starting charts",
}


class StartProgress:
    """Display of the current phase and of each deployment's replicas."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started_at = time.monotonic()
        self._spinner = Spinner("dots")
        self._phase = ""
        self._rows: dict[str, str] = {}
        self._printed: dict[str, str] = {}
        self._live = Live(
            console=console, transient=True, refresh_per_second=8, get_renderable=self._table
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(
        self,
        phase: str,
        application: ApplicationStatus | None,
        builds: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Show the current phase, running builds, and the application's deployments, if known."""
        deployments = application.deployments if application else ()
        self._phase = PHASE_TEXTS[phase]
        self._rows = dict(builds) | {d.name: _describe(d) for d in deployments}
        if self._console.is_terminal:
            return
        for name, text in {"start": self._phase, **self._rows}.items():
            if self._printed.get(name) != text:
                self._printed[name] = text
                seconds = time.monotonic() - self._started_at
                line = f"{seconds:6.1f} s  {name}: {text}"
                self._console.print(line, highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        seconds = time.monotonic() - self._started_at
        self._spinner.update(text=f"{self._phase}, {seconds:.0f} s")
        table = Table.grid(padding=(0, 2))
        table.add_row(self._spinner)
        for name, text in self._rows.items():
            table.add_row(f"  {name}", text)
        return table


def _describe(deployment: DeploymentStatus) -> str:
    text = f"{deployment.running}/{deployment.target} replicas"
    if not deployment.healthy and deployment.message:
        return f"{text}; {reason(deployment.message, limit=160)}"
    return text
