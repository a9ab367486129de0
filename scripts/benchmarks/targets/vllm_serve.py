"""vLLM's own server with its defaults: compiled, and with a cache of what was compiled before."""

import contextlib
import sys
import time
from collections.abc import Iterator

from benchmarks.endpoint import Endpoint
from benchmarks.targets.first_token import NAME, Ready, wait_first_token
from benchmarks.targets.home import free_ports, new_home
from benchmarks.targets.running import Running


@contextlib.contextmanager
def vllm_serve(model: str) -> Iterator[Ready]:
    """One server of the model in this directory."""
    (port,) = free_ports(1)
    endpoint = Endpoint(port, NAME)
    with new_home("vllm") as home:
        began = time.monotonic()
        home.spawn(
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", model, "--served-model-name", NAME),
            *("--host", "127.0.0.1", "--port", str(port)),
            # For its KV cache it would take 92 % of the machine's memory, or not start.
            *("--gpu-memory-utilization", "0.5"),
        )
        wait_first_token(home, endpoint, "/health")
        yield Ready(Running(endpoint, home), time.monotonic() - began)
