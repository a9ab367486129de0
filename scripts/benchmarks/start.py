"""Start of the default configuration, and what it uses without requests.

- clone to first answer: `git clone` of this checkout's commit, then `./scripts/up` with an empty
  home and without package caches, until a request to the generator is answered. Needs the package
  index; `--skip-clone` leaves it out;
- warm start: `tandem up -d` with installed packages and built models, until everything is healthy;
- idle: CPU time and PSS of all processes of that cluster. The clients that wait for it have ended.
"""

import argparse
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine.servers import prepare_model
from benchmarks.processes import MB, cpu_used, pss_mb, take_cpu_snapshot
from benchmarks.report import Report, Table, print_progress
from benchmarks.rounds import Summary
from benchmarks.targets.home import ROOT, new_home
from benchmarks.targets.tandem import start_default, tandem_default

CLONE_TIMEOUT_S = 1800.0
SETTLE_S = 30.0  # the first collections of metrics and Serve's first polls are over by then
GB = 1e9
GOALS = {
    "clone_to_first_answer_s": "<= 120",
    "warm_start_s": "<= 20",
    "idle_cpu_cores": "<= 0.05",
    "idle_memory_gb": "<= 3",
}
# pip and uv must download as on a new machine; the modules must be those of the clone.
NEW_MACHINE = {"PIP_NO_CACHE_DIR": "1", "UV_NO_CACHE": "1", "PYTHONPATH": ""}


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
    for number in range(args.rounds):
        if not skip_clone:
            clones.append(_clone_to_first_answer())
            print_progress(number, "clone", f"first answer after {clones[-1]:.0f} s")
        if not starts:
            _start_once()
        starts.append(_warm_start(seconds))
        print_progress(number, "warm start", f"healthy after {starts[-1].healthy_s:.1f} s")
    return make_report(clones, starts)


def _start_once() -> None:
    """Make the next start a warm one: the models are built, and their precisions compared."""
    prepare_model()  # not before the clone, whose home is its own
    with tandem_default():
        pass


def _clone_to_first_answer() -> float:
    with new_home("clone") as home:
        checkout = home.path / "checkout"
        began = time.monotonic()
        subprocess.run(["git", "clone", "-q", ROOT, checkout], check=True)
        cloned_s = time.monotonic() - began
        started = start_default(
            home, checkout / "scripts/up", environment=NEW_MACHINE, timeout_s=CLONE_TIMEOUT_S
        )
        return cloned_s + started.ready_s


def _warm_start(idle_s: float) -> WarmStart:
    with tandem_default() as target:
        home = target.running.home.path
        time.sleep(SETTLE_S)
        idle = measure_idle(home, idle_s)
    return WarmStart(target.ready_s, target.healthy_s, idle)


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
