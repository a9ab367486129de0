"""Faults that can be injected into a cluster under load.

A fault is a function that injects it, waits for its duration and ends it. It returns a condition of
the cluster's recovery, in addition to the health of all deployments.
"""

import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import httpx
import psutil

from benchmarks.endpoint import TargetError
from cluster.engines.lifeline import PARENT_VARIABLE
from cluster.errors import TandemError
from cluster.launch import processes
from resilience.accounting import Target
from resilience.inside.fault_points import POISON, Control
from resilience.inside.link_proxy import LinkFault
from resilience.testbed import (
    CLASSIFIERS,
    GENERATOR,
    KILL_POLL_S,
    MODEL,
    NUM_REPLICAS,
    ROUTER,
    Setup,
    Testbed,
)

Condition = Callable[[], bool]
Inject = Callable[[Testbed, random.Random], Condition]
Find = Callable[[Testbed, random.Random], psutil.Process]

STOP_S, LONG_STOP_S = 10.0, 60.0
"""Duration of a pause with SIGSTOP."""
LINK_S = 15.0
"""Duration of a fault of a link; a silent link is given up after ten seconds."""
CLOCK_STEP_S = 3600.0
CLOCK_S = 5.0
DISK_S = 10.0
OUT_OF_MEMORY_S = 5.0
MEMORY_LEFT_BYTES = 4 * 1024**2
SILENT_S = 2.0
"""Time without a sign of life after which a link counts as silent."""


def always() -> bool:
    return True


def kill(find: Find) -> Inject:
    """Return a fault that kills a process with SIGKILL."""

    def inject(testbed: Testbed, rng: random.Random) -> Condition:
        process = find(testbed, rng)
        # The replica of an engine's process; the process itself if it belongs to no other.
        default = process.ppid() if process.ppid() in testbed.pids() else process.pid
        owner = processes.environment_of(process.pid).get(PARENT_VARIABLE, str(default))
        process.kill()
        with contextlib.suppress(psutil.NoSuchProcess):
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(KILL_POLL_S)
        return lambda: is_replaced(find, testbed, process, int(owner))

    return inject


def is_replaced(find: Find, testbed: Testbed, old: psutil.Process, owner: int) -> bool:
    """Return True if a process like a dead one exists, and Serve knows that the old one is dead."""
    try:
        return owner not in testbed.pids() and find(testbed, random.Random(0)) != old
    except (TandemError, psutil.Error):
        return False


def stop(find: Find, seconds: float = STOP_S) -> Inject:
    """Return a fault that stops a process with SIGSTOP, and continues it if it still exists."""

    def inject(testbed: Testbed, rng: random.Random) -> Condition:
        process = find(testbed, rng)
        process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        return always

    return inject


def titled(title: str) -> Find:
    return lambda testbed, _: testbed.titled(title)


def replica_of(deployment: str) -> Find:
    return lambda testbed, rng: testbed.replica(deployment, rng)


def kill_simulated_engine(testbed: Testbed, rng: random.Random) -> Condition:
    """Let the engine of a replica die in its process, and wait until the replica is replaced."""
    process = testbed.replica(GENERATOR, rng)
    testbed.control(Control(dead_engine_pid=process.pid))
    return lambda: not process.is_running()


def break_link(fault: LinkFault) -> Inject:
    """Return a fault of the network between the routers and one replica."""

    def inject(testbed: Testbed, rng: random.Random) -> Condition:
        pid = testbed.replica(GENERATOR, rng).pid
        testbed.control(Control(link_pid=pid, link=fault))
        try:
            time.sleep(LINK_S)
        finally:
            testbed.control(Control())
        return always

    return inject


def step_clocks(testbed: Testbed, _rng: random.Random) -> Condition:
    """Move the wall clocks of routers and replicas forwards, then backwards."""
    try:
        for step_s in (CLOCK_STEP_S, -CLOCK_STEP_S):
            testbed.control(Control(clock_step_s=step_s))
            time.sleep(CLOCK_S)
    finally:
        testbed.control(Control())
    return always


def fill_disk(testbed: Testbed, _rng: random.Random) -> Condition:
    """Fill the file system with state and logs for some time."""
    if not os.path.ismount(testbed.home):
        raise TargetError("The cluster's home is not a separate file system.")
    file = testbed.home / "full"
    try:
        with contextlib.suppress(OSError), file.open("wb") as filling:
            while True:
                filling.write(bytes(1024**2))
                filling.flush()
        time.sleep(DISK_S)
    finally:
        file.unlink(missing_ok=True)
    return always


def exhaust_memory(find: Find) -> Inject:
    """Return a fault that lets allocations of a process fail for some time."""

    def inject(testbed: Testbed, rng: random.Random) -> Condition:
        process = find(testbed, rng)
        limit = process.memory_info().vms + MEMORY_LEFT_BYTES
        _, hard = process.rlimit(resource.RLIMIT_AS)
        process.rlimit(resource.RLIMIT_AS, (limit, hard))
        time.sleep(OUT_OF_MEMORY_S)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.rlimit(resource.RLIMIT_AS, (hard, hard))
        return always

    return inject


def poison(testbed: Testbed, _rng: random.Random) -> Condition:
    """Send a request that kills the replica it reaches, and wait for its error.

    Raises:
        TargetError: Its answer is not the documented error.
    """
    before = testbed.replicas()
    answer = httpx.post(
        f"{testbed.state.http_url}/v1/completions",
        json={"model": MODEL, "prompt": "a", "max_tokens": 4},
        headers={"x-session-id": POISON.decode()},
        timeout=120,
        trust_env=False,
    )
    if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
        raise TargetError(f"The poison request got {answer.status_code}: {answer.text[:200]}")
    return lambda: testbed.replicas().keys() != before.keys()


def update(testbed: Testbed, rng: random.Random) -> Condition:
    """Replace all generators by a rolling update."""
    old = {id_ for id_, name in testbed.replicas().items() if name == GENERATOR}
    # Most other changes restart nothing.
    testbed.deploy(resources={"cpus": round(rng.uniform(0.05, 0.1), 4)})

    def is_updated() -> bool:
        now = testbed.replicas()
        return bool(now) and not old & now.keys()

    return is_updated


def scale(testbed: Testbed, _rng: random.Random) -> Condition:
    """Add a generator replica, then remove one."""

    def has(num: int) -> bool:
        return [*testbed.replicas().values()].count(GENERATOR) == num

    for num in (NUM_REPLICAS + 1, NUM_REPLICAS):
        testbed.deploy(replicas={"min": num, "max": num})
        deadline = time.monotonic() + 120
        while not has(num):
            if time.monotonic() > deadline:
                raise TargetError(f"Scaling to {num} replicas took longer than 120 s.")
            time.sleep(0.2)
    return always


PROMPT = Target()
INGRESS = Target(may_break_ingress=True)
HANGS = Target(recovery_s=2.0 + SILENT_S)
"""Clients wait until a link counts as silent, and then as long as after a death."""
UNBOUNDED = Target(recovery_s=None)
POISONED = Target(recovery_s=None, max_failed=2)
"""A request that no replica has answered when the poison kills its second one fails, too."""
STOPPED_INGRESS = Target(recovery_s=None, may_break_ingress=True)
"""A stopped router or HAProxy delays its clients until it goes on or is replaced."""
SIM, VLLM = frozenset({"sim"}), frozenset({"vllm", "vllm-tiny"})


@dataclass(frozen=True, slots=True)
class Fault:
    """Fault with its targets and requirements."""

    inject: Inject
    target: Target = PROMPT
    engines: frozenset[str] = SIM | VLLM
    needs_ranks: bool = False
    needs_disk: bool = False

    def missing(self, setup: Setup) -> str:
        """Return what the cluster lacks for this fault; empty if nothing."""
        if setup.engine not in self.engines:
            return f"engine {'/'.join(sorted(self.engines))}"
        if self.needs_ranks and setup.tensor_parallel < 2:
            return "--engine vllm-tiny --tensor-parallel 2"  # SmolLM2 has 9 heads
        return "root" if self.needs_disk and not setup.has_disk else ""


_PROCESSES: Mapping[str, tuple[Find, Target, Target]] = {
    "controller": (titled("ray::ServeController"), PROMPT, PROMPT),
    "haproxy": (titled("haproxy -db"), INGRESS, STOPPED_INGRESS),
    "router": (replica_of(ROUTER), INGRESS, STOPPED_INGRESS),
    "generator": (replica_of(GENERATOR), PROMPT, HANGS),
    "classifier": (replica_of(CLASSIFIERS), PROMPT, HANGS),
}
"""Processes to kill and to stop, with the targets of both."""
FAULTS: Mapping[str, Fault] = {
    **{f"kill-{name}": Fault(kill(find), killed) for name, (find, killed, _) in _PROCESSES.items()},
    "kill-engine": Fault(kill_simulated_engine, engines=SIM),
    "kill-engine-core": Fault(kill(Testbed.engine_core), engines=VLLM),
    "kill-rank": Fault(kill(titled("VLLM::Worker")), engines=VLLM, needs_ranks=True),
    **{
        f"stop-{name}": Fault(stop(find), stopped)
        for name, (find, _, stopped) in _PROCESSES.items()
    },
    "stop-raylet": Fault(stop(titled("raylet/raylet"))),
    "stop-engine-core": Fault(stop(Testbed.engine_core), UNBOUNDED, engines=VLLM),
    "stop-rank": Fault(stop(titled("VLLM::Worker")), UNBOUNDED, engines=VLLM, needs_ranks=True),
    **{
        f"stop60-{name}": Fault(stop(find, LONG_STOP_S), stopped)
        for name, (find, _, stopped) in _PROCESSES.items()
    },
    "link-delay": Fault(break_link(LinkFault(delay_s=0.05))),
    "link-loss": Fault(break_link(LinkFault(loss=0.05))),
    "link-requests": Fault(break_link(LinkFault(holds_requests=True)), HANGS),
    "link-answers": Fault(break_link(LinkFault(holds_answers=True)), HANGS),
    "memory": Fault(exhaust_memory(replica_of(GENERATOR))),
    "disk": Fault(fill_disk, needs_disk=True),
    "clock": Fault(step_clocks),
    # It may kill every replica; the others' requests wait for new ones.
    "poison": Fault(poison, POISONED),
    "update": Fault(update),
    "scale": Fault(scale),
}
SHORT = (
    *("kill-controller", "kill-haproxy", "kill-router", "kill-generator", "kill-engine"),
    *("link-answers", "clock", "poison", "update"),
)
"""Faults of the short form; most of the rest differ by their duration or process only."""
