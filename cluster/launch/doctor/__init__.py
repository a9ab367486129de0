"""Diagnosis of everything a cluster depends on (``tandem doctor``).

Checks change nothing. A check that raises becomes a finding itself.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cluster.config.file import LoadedConfig
from cluster.launch import auth, processes, state
from cluster.launch.doctor import machine, running
from cluster.launch.doctor.finding import Finding, Level, fail
from cluster.launch.doctor.software import check_software
from cluster.launch.other_ray import read_other_status

__all__ = ["Finding", "Level", "run_checks"]


def run_checks(loaded: LoadedConfig, home: Path) -> Iterator[Finding]:
    """Yield the findings of all checks of the running cluster, or of the one to start."""
    offset_s = running.clock_offset()
    owned = processes.find(home)
    known = state.load(home)
    alive = state.is_alive(owned, known)
    known = known if alive else None
    other = None if owned else read_other_status()
    if other is not None:
        known, alive = other.state, True
    config = loaded.config
    variables: dict[str, str] = {**os.environ}
    if known is not None and known.address is not None:  # of several nodes
        variables |= auth.token_variables(home)
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("software", lambda: check_software(config)),
        ("processes", lambda: running.check_processes(home, owned, known, alive=alive)),
        ("ports", lambda: running.check_ports(loaded, owned, known)),
        ("machine", lambda: machine.check_machine(config, home, is_running=alive)),
        ("gpu", lambda: machine.check_gpus(config)),
        ("models", lambda: machine.check_models(config)),
        ("authentication", lambda: running.check_auth(variables, loaded)),
    ]
    if known is not None:
        checks.append(("cluster", lambda: running.check_endpoints(known, home)))
    checks.append(("clock", lambda: [running.check_clock_steps(running.clock_offset() - offset_s)]))
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:  # a failing check must not hide the findings of the others
            yield fail(name, f"check failed: {error!r}", "Please report this as a bug.")
