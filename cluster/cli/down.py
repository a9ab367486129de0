"""``tandem down``."""

from rich.console import Console

from cluster.launch.stop import Stopped, stop
from cluster.models.store import home


def run(drain_s: float) -> None:
    """End the cluster and say how."""
    console = Console()
    with console.status("ending the cluster"):
        stopped = stop(home(), drain_s=drain_s)
    console.print(describe(stopped))


def describe(stopped: Stopped | None) -> str:
    """One line on what ``stop`` did."""
    if stopped is None:
        return "nothing runs"
    number = stopped.ended.terminated + stopped.ended.killed
    requests = "every request finished" if stopped.drained else "requests were not waited for"
    return f"ended {number} processes in {stopped.seconds:.1f} s; {requests}"
