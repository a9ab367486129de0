"""``ray.serve.llm``, Ray Serve's own application for vLLM, with its defaults or tuned.

Runs as ``python -m benchmarks.targets.serve_llm PORT MODEL [tuned]``, which starts a separate Ray.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.endpoint import Endpoint
from benchmarks.ports import free_ports
from benchmarks.targets.home import Home, format_command, new_home
from benchmarks.targets.running import (
    REAL_MODEL,
    ReadyTarget,
    RunningTarget,
    wait_first_token,
)
from benchmarks.targets.serve_handle import tuned_serve_environment
from benchmarks.targets.vllm import TUNED_ENGINE, tuned_environment

LOGICAL_CPUS = 8
"""CPUs that Ray reports: ingress and engine reserve more than two."""
TUNED = "tuned"
DIRECT_STREAMING = {"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"}


@contextlib.contextmanager
def serve_llm(model: str, *, tuned: bool = False) -> Iterator[ReadyTarget]:
    """Run one replica of a model; ``model`` is its directory.

    Tuned: HAProxy as Tandem configures it, throughput settings, responses that go from the replica
    to HAProxy directly, no batching of tokens, and vLLM's tuned options.
    """
    (port,) = free_ports(1)
    endpoint = Endpoint(port, REAL_MODEL)
    options = (TUNED,) if tuned else ()
    command = (sys.executable, "-m", "benchmarks.targets.serve_llm", str(port), model, *options)
    with new_home("llm") as home:
        environment, shown = _environment(home) if tuned else ({}, {})
        began = time.monotonic()
        home.spawn(*command, environment=environment)
        wait_first_token(home, endpoint, "/v1/models")  # it has no /health
        ready_s = time.monotonic() - began
        line = format_command(command, shown)
        yield ReadyTarget(RunningTarget(endpoint, home), ready_s, line)


def _environment(home: Home) -> tuple[dict[str, str], dict[str, str]]:
    """Return the tuned environment, and the part of it to show."""
    vllm = {**tuned_environment(), **DIRECT_STREAMING}
    switches = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")
    environment = {**tuned_serve_environment(home), **vllm}
    return environment, {**{name: environment[name] for name in switches}, **vllm}


def _llm_arguments(model: str, *, tuned: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model_loading_config": {"model_id": REAL_MODEL, "model_source": model},
        "accelerator_config": {"kind": "cpu"},
        # The default KV cache is 92 % of the machine's memory, which may not be free.
        "engine_kwargs": {"gpu_memory_utilization": 0.5},
        "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
    }
    if tuned:
        arguments["engine_kwargs"] = {**TUNED_ENGINE, "enforce_eager": True}
        arguments["experimental_configs"] = {"stream_batching_interval_ms": 0}
        variables: Mapping[str, str] = tuned_environment()
        arguments["runtime_env"] = {"env_vars": dict(variables)}
    return arguments


def _main(port: int, model: str, tuned: bool) -> None:
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    ray.init(
        num_cpus=max(LOGICAL_CPUS, os.cpu_count() or 1),
        include_dashboard=False,
        _temp_dir=os.environ["TANDEM_HOME"],
        _node_ip_address="127.0.0.1",
    )
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    config = LLMConfig(**_llm_arguments(model, tuned=tuned))
    serve.run(build_openai_app({"llm_configs": [config]}), name="llm", route_prefix="/")
    signal.pause()


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2], TUNED in sys.argv[3:])
