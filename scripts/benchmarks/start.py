"""Start of the default configuration, and what it uses without requests.

- clone to first answer: `git clone` of this checkout's commit, then `./scripts/up` with an empty
  home and without package caches, until a request to the generator is answered. Needs the package
  index; `--skip-clone` leaves it out, and installs with caches;
- warm start: `tandem up -d` of that installation, which has no packages of development, with built
  models, until everything is healthy. Home and ports are the same in all rounds, as a user's are; a
  first start in this home is not measured;
- idle: CPU time and PSS of all processes of that cluster. The clients that wait for it have ended.
"""

import argparse
import contextlib
import subprocess
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine.servers import prepare_model
from benchmarks.ports import free_ports
from benchmarks.processes import MB, cpu_used, pss_mb, take_cpu_snapshot
from benchmarks.report import Report, Table, print_progress
from benchmarks.rounds import Summary
from benchmarks.targets.home import ROOT, Home, new_home
from benchmarks.targets.running import ReadyTarget
from benchmarks.targets.tandem import NUM_PORTS, share_cache, start_default

CLONE_TIMEOUT_S = 1800.0
SETTLE_S = 30.0  # the first collections of metrics and Serve's first polls are over by then
GB = 1e9
GOALS = {
    "clone_to_first_answer_s": "<= 120",
    "warm_start_s": "<= 20",
    "idle_cpu_cores": "<= 0.05",
    "idle_memory_gb": "<= 3",
}
CLONED_CODE = {"PYTHONPATH": ""}
# pip and uv must download as on a new machine.
NEW_MACHINE = {**CLONED_CODE, "PIP_NO_CACHE_DIR": "1", "UV_NO_CACHE": "1"}


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """Use of the processes with one name, without requests."""

    cores: float
    pss_mb: float


@dataclass(frozen=True, slots=True)
class WarmStart:
    """One start with built models, and the idle cluster after it."""

    first_token_s: float
    healthy_s: float
    idle: dict[str, ProcessUse]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--skip-clone", action="store_true", help="only the warm start and idling")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of the idle time")


def run(args: argparse.Namespace) -> Report:
    """Measure a new machine's start and a warm start in every round."""
    seconds = min(args.seconds, 10.0) if args.quick else args.seconds
    skip_clone = args.skip_clone or args.quick
    clones: list[float] = []
    starts: list[WarmStart] = []
    with new_home("installed") as installed, new_home("warm") as home:
        for number in range(args.rounds):
            if not skip_clone:
                clones.append(_measure_clone(None if clones else installed))
                print_progress(number, "clone", f"first answer after {clones[-1]:.0f} s")
            if not starts:
                warm = _prepare_warm_starts(home, installed, is_installed=not skip_clone)
            starts.append(warm.measure(seconds))
            print_progress(number, "warm start", f"healthy after {starts[-1].healthy_s:.1f} s")
    return make_report(clones, starts)


def _measure_clone(kept: Home | None) -> float:
    """Return the seconds to the first answer; clone into ``kept`` or a temporary directory."""
    with contextlib.nullcontext(kept) if kept else new_home("clone") as home:
        cloned_s = _clone(home)
        up = _checkout(home) / "scripts/up"
        started = start_default(home, up, environment=NEW_MACHINE, timeout_s=CLONE_TIMEOUT_S)
        home.stop()
        return cloned_s + started.ready_s


def _checkout(home: Home) -> Path:
    return home.path / "checkout"


def _clone(home: Home) -> float:
    began = time.monotonic()
    subprocess.run(["git", "clone", "-q", ROOT, _checkout(home)], check=True)
    return time.monotonic() - began


@dataclass(frozen=True, slots=True)
class _WarmCluster:
    """A home with built models, in which every start is a warm one."""

    home: Home
    tandem: Path
    ports: Sequence[int]

    def start(self) -> ReadyTarget:
        return start_default(
            self.home, self.tandem, "up", environment=CLONED_CODE, ports=self.ports
        )

    def measure(self, idle_s: float) -> WarmStart:
        """Measure one start and then the idle cluster."""
        target = self.start()
        time.sleep(SETTLE_S)
        idle = measure_idle(self.home.path, idle_s)
        self.home.stop()
        return WarmStart(target.ready_s, target.healthy_s, idle)


def _prepare_warm_starts(home: Home, installed: Home, *, is_installed: bool) -> _WarmCluster:
    """Install in ``installed`` if needed, and start a cluster in ``home`` once."""
    if not is_installed:
        _clone(installed)
        up = _checkout(installed) / "scripts/up"
        installed.run(up, "--help", timeout_s=CLONE_TIMEOUT_S, environment=CLONED_CODE)
    prepare_model()  # not before the clone, whose home is its own
    share_cache(home)
    tandem = _checkout(installed) / ".venv/bin/tandem"
    cluster = _WarmCluster(home, tandem, free_ports(NUM_PORTS))
    cluster.start()  # compares the precisions of models, and checks the configuration
    home.stop()
    return cluster


def measure_idle(home: Path, seconds: float) -> dict[str, ProcessUse]:
    """Return CPU and memory of the processes of ``home`` by name, over ``seconds``."""
    before = take_cpu_snapshot(home, name_of)
    time.sleep(seconds)
    used = cpu_used(before, take_cpu_snapshot(home, name_of))
    memory = pss_mb(home, name_of)
    names = memory.keys() | used.keys()
    return {n: ProcessUse(used.get(n, 0.0) / seconds, memory.get(n, 0.0)) for n in sorted(names)}


def name_of(command: str) -> str:
    """Return the title of a Ray process, or the program or Python module of a command line."""
    program, *words = command.split() or ["?"]
    if not Path(program).name.startswith("python"):
        return Path(program).name if program.startswith("/") else program
    return next((Path(word).name for word in words if not word.startswith("-")), "python")


def make_report(clones: list[float], starts: list[WarmStart]) -> Report:
    """Make the report of all rounds; ``clones`` may be empty."""
    uses = [start.idle.values() for start in starts]
    keys = {"clone_to_first_answer_s": Summary(tuple(clones))} if clones else {}
    keys |= {
        "warm_start_s": Summary(tuple(start.healthy_s for start in starts)),
        "idle_cpu_cores": Summary(tuple(sum(u.cores for u in use) for use in uses)),
        "idle_memory_gb": Summary(tuple(sum(u.pss_mb for u in use) * MB / GB for use in uses)),
    }
    by_name: defaultdict[str, list[ProcessUse]] = defaultdict(list)
    for start in starts:
        for name, use in start.idle.items():
            by_name[name].append(use)
    rows = [
        (name, Summary(tuple(u.cores for u in found)), Summary(tuple(u.pss_mb for u in found)))
        for name, found in sorted(by_name.items(), key=lambda item: -max(u.cores for u in item[1]))
    ]
    return Report(
        keys=keys,
        goals={name: goal for name, goal in GOALS.items() if name in keys},
        tables=[Table("Idle cluster by process name", ("process", "cores", "PSS, MB"), rows)],
        details={"starts": starts},
        notes=["The warm start ends when `tandem up -d` does; its first token may come earlier."],
    )
