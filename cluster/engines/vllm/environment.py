"""Environment variables for vLLM and the processes it starts."""

import logging
import os
import re
import sys
from collections.abc import Collection, Mapping, MutableMapping
from pathlib import Path

from cluster.config import GeneratorConfig
from cluster.engines.lifeline import PARENT_VARIABLE
from cluster.errors import ConfigError

logger = logging.getLogger(__name__)

BINDING_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
INTEL_OPENMP = Path(sys.prefix) / "lib" / "libiomp5.so"
"""Installed with vLLM on x86, whose documentation recommends it."""
PRELOAD = "LD_PRELOAD"
TRACING_ENVIRONMENT = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
"""Makes vLLM export spans over HTTP, like Tandem, instead of gRPC."""


class Environment:
    """Environment variables that are set while an engine runs."""

    def __init__(self, variables: MutableMapping[str, str] = os.environ) -> None:
        self._variables = variables
        self._before: dict[str, str | None] = {}

    def set_defaults(self, wanted: Mapping[str, str]) -> None:
        self.set_all({n: value for n, value in wanted.items() if n not in self._variables})

    def set_all(self, wanted: Mapping[str, str]) -> None:
        for name, value in wanted.items():
            self._before.setdefault(name, self._variables.get(name))
            self._variables[name] = value

    def restore(self) -> None:
        for name, value in self._before.items():
            self._variables.pop(name, None)
            if value is not None:
                self._variables[name] = value
        self._before.clear()


def base_environment(*model_paths: str) -> dict[str, str]:
    """Return the variables to set before vLLM is imported.

    Args:
        model_paths: Directories or Hugging Face ids of the model and its adapters.
    """
    wanted = {
        PARENT_VARIABLE: str(os.getpid()),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if all(os.path.isdir(path) for path in model_paths):
        wanted["HF_HUB_OFFLINE"] = "1"
    return wanted


def cpu_environment(config: GeneratorConfig) -> dict[str, str]:
    return {
        # Run a single worker inside the engine's process, which saves starting one.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Use all cores; vLLM's default leaves one idle.
        BINDING_VARIABLE: bind_threads(sorted(os.sched_getaffinity(0)), config.num_workers),
    }


def preload_environment(
    environment: Mapping[str, str], library: Path = INTEL_OPENMP
) -> dict[str, str]:
    """Return LD_PRELOAD with Intel's OpenMP; empty if it is missing or another one is preloaded.

    Its barriers need less time than those of GNU's, which PyTorch is built with.
    """
    if preloaded_openmp(environment) is not None or not library.is_file():
        return {}
    return {PRELOAD: ":".join(filter(None, (str(library), environment.get(PRELOAD))))}


def preloaded_openmp(environment: Mapping[str, str]) -> str | None:
    """Return the first OpenMP library in LD_PRELOAD, which takes precedence; None without one."""
    libraries = re.split(r"[:\s]", environment.get(PRELOAD, ""))  # separators of ld.so(8)
    names = ("libiomp", "libgomp", "libomp")
    return next((found for found in libraries if Path(found).name.startswith(names)), None)


def threads_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return OMP_NUM_THREADS for the cores in VLLM_CPU_OMP_THREADS_BIND; empty if it names none."""
    # vLLM sets it only for workers in separate processes. It must replace the present value: Ray
    # sets it to the replica's CPUs rounded down, which is 1 for replicas that share cores.
    threads = count_threads(environment[BINDING_VARIABLE])
    return {} if threads is None else {"OMP_NUM_THREADS": str(threads)}


def check_binding(binding: str, config: GeneratorConfig, usable: Collection[int]) -> None:
    """Check a binding of the environment, which all replicas of a node share.

    Raises:
        ConfigError: It names cores that this process may not use.
    """
    workers = [_named_cores(worker) for worker in binding.split("|")]
    named = {core for cores in workers if cores for core in cores}
    if missing := named - set(usable):
        raise ConfigError(
            f"generator {config.name!r}: {BINDING_VARIABLE} is {binding!r}, but the replica may "
            f"not use the cores {sorted(missing)}; it may use {sorted(usable)}."
        )
    if named and config.replicas.max > 1:
        logger.warning(
            "%s=%s binds all replicas of a node to the same cores. Run one replica per node, or "
            "set it to `nobind` and OMP_NUM_THREADS to the threads of one replica.",
            *(BINDING_VARIABLE, binding),
        )


def count_threads(binding: str) -> int | None:
    """Return the threads of the first worker in a binding such as ``0,1|2-3``.

    None if vLLM decides (``auto``, ``nobind``).
    """
    cores = _named_cores(binding.split("|")[0])
    return None if cores is None else len(cores)


def _named_cores(worker: str) -> list[int] | None:
    """Return the cores of one worker in a binding; None if it names none."""
    cores: list[int] = []
    for part in worker.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            return None
        cores += range(int(first), int(last or first) + 1)
    return cores


def bind_threads(cores: list[int], num_workers: int) -> str:
    """Return a binding of ``cores`` to workers: ``0,1`` for one worker, ``0|1`` for two.

    Workers share cores if there are fewer cores than workers.
    """
    share = max(1, len(cores) // num_workers)
    assigned = [cores[i % len(cores)] for i in range(share * num_workers)]
    parts = [assigned[i : i + share] for i in range(0, len(assigned), share)]
    return "|".join(",".join(map(str, part)) for part in parts)


def core_share(environment: Mapping[str, str], num_workers: int, num_cores: int) -> float:
    """Return the share of the node's cores that vLLM's threads use, in its replica's environment.

    0 if vLLM does not run on CPUs.
    """
    binding = environment.get(BINDING_VARIABLE)
    if binding is None:
        return 0.0
    threads = environment.get("OMP_NUM_THREADS", "")
    if binding != "nobind" or not threads.isdigit():
        return 1.0  # all replicas of a node would bind their threads to the same cores
    return min(1.0, int(threads) * num_workers / num_cores)
