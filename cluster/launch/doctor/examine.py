"""All checks, in their order."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cluster.config.file import LoadedConfig
from cluster.launch import processes, state
from cluster.launch.doctor import machine, running
from cluster.launch.doctor.finding import Finding, fail
from cluster.launch.doctor.software import check_software


def examine(loaded: LoadedConfig, home: Path) -> Iterator[Finding]:
    """What every check finds, as they go.

    Args:
        loaded: The configuration of the cluster that runs, or is to.
        home: What it is, or will be, started with.
    """
    began = running.Clocks.read()
    owned = processes.find(home)
    alive = processes.has_head(owned)
    known = state.load(home) if alive else None
    config = loaded.config
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("software", lambda: check_software(config)),
        ("processes", lambda: running.check_processes(home, owned)),
        ("ports", lambda: running.check_ports(loaded, owned)),
        ("machine", lambda: machine.check_machine(config, home, runs=alive)),
        ("gpu", lambda: machine.check_gpus(config)),
        ("models", lambda: machine.check_models(config)),
        ("authentication", lambda: running.check_auth(os.environ, loaded)),
    ]
    if known is not None:
        checks.append(("cluster", lambda: running.check_answers(known)))
    checks.append(("clock", lambda: [running.check_steps(began, running.Clocks.read())]))
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:  # a check that fails must not hide what the others find
            yield fail(name, f"could not be checked: {error!r}", "please report this")
