"""``ray.serve.llm``, Ray Serve's own application for vLLM, with its defaults.

Runs as ``python -m benchmarks.targets.serve_llm PORT MODEL``, which starts a separate Ray.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator

from benchmarks.endpoint import Endpoint
from benchmarks.ports import free_ports
from benchmarks.targets.home import new_home
from benchmarks.targets.running import REAL_MODEL, ReadyTarget, RunningTarget, wait_first_token

LOGICAL_CPUS = 8
"""CPUs that Ray reports: ingress and engine reserve more than two."""


@contextlib.contextmanager
def serve_llm(model: str) -> Iterator[ReadyTarget]:
    """Run one replica of a model. ``model`` is the model's directory."""
    (port,) = free_ports(1)
    endpoint = Endpoint(port, REAL_MODEL)
    with new_home("llm") as home:
        began = time.monotonic()
        home.spawn(sys.executable, "-m", "benchmarks.targets.serve_llm", str(port), model)
        wait_first_token(home, endpoint, "/v1/models")  # it has no /health
        yield ReadyTarget(RunningTarget(endpoint, home), time.monotonic() - began)


def _main(port: int, model: str) -> None:
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
    config = LLMConfig(
        model_loading_config={"model_id": REAL_MODEL, "model_source": model},
        accelerator_config={"kind": "cpu"},
        # The default KV cache is 92 % of the machine's memory, which may not be free.
        engine_kwargs={"gpu_memory_utilization": 0.5},
        deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
    )
    serve.run(build_openai_app({"llm_configs": [config]}), name="llm", route_prefix="/")
    signal.pause()


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2])
