"""Servers that ``bench engine`` compares, by the names in its options and tables."""

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.endpoint import TargetError
from benchmarks.engine.inprocess import start_engine
from benchmarks.engine.measure import HttpSender, PromptSender
from benchmarks.targets.llama_cpp import llama_cpp
from benchmarks.targets.running import ReadyTarget
from benchmarks.targets.serve_llm import serve_llm
from benchmarks.targets.tandem import TANDEM, tandem_default
from benchmarks.targets.vllm import tuned_options, vllm_serve, zentorch_options
from cluster.launch.log_files import log_directory, log_files
from cluster.models.store import resolve

CLUSTER = "cluster"
IN_PROCESS = "in-process"
VLLM = "vllm"
VLLM_TUNED = "vllm-tuned"
LLAMA_CPP = "llama-cpp"
SERVE_LLM = "serve-llm"
SERVE_LLM_TUNED = "serve-llm-tuned"
MODEL = "smollm2-135m-instruct"

_SCALE_EVENT = re.compile(r"autoscaling: .*")


@dataclass(frozen=True, slots=True)
class EngineServer:
    """Running server, or engine without a server."""

    sender: PromptSender
    ready_s: float
    """Seconds from the start of its first process to the first token."""
    command: str
    home: Path | None = None
    """Directory of a Tandem cluster; None for the others."""

    def read_scale_events(self) -> list[str]:
        """Return the autoscaling decisions in the log of Serve's controller."""
        return [] if self.home is None else find_scale_events(log_directory(self.home))


def find_scale_events(directory: Path) -> list[str]:
    """Return the autoscaling decisions in the controller's logs below a directory."""
    return [
        found
        for path in log_files(directory)
        if path.name.startswith("controller_")
        for found in _SCALE_EVENT.findall(path.read_text("utf-8", "replace"))
    ]


StartServer = Callable[[str], AbstractContextManager[EngineServer]]
"""Start a server; the argument is the model's directory."""


def _http(start: Callable[[str], AbstractContextManager[ReadyTarget]]) -> StartServer:
    @contextlib.contextmanager
    def server(model: str) -> Iterator[EngineServer]:
        with start(model) as ready:
            yield EngineServer(HttpSender(ready.running.endpoint), ready.ready_s, ready.command)

    return server


@contextlib.contextmanager
def _cluster(_model: str) -> Iterator[EngineServer]:
    with tandem_default() as ready:
        sender = HttpSender(ready.running.endpoint)
        yield EngineServer(sender, ready.ready_s, ready.command, ready.running.home.path)


@contextlib.contextmanager
def _in_process(model: str) -> Iterator[EngineServer]:
    with start_engine(model) as (sender, ready_s, command):
        yield EngineServer(sender, ready_s, command)


TARGETS: Mapping[str, StartServer] = {
    CLUSTER: _cluster,
    IN_PROCESS: _in_process,
    VLLM: _http(vllm_serve),
    VLLM_TUNED: _http(lambda model: vllm_serve(model, tuned_options())),
    "vllm-tuned-compiled": _http(lambda model: vllm_serve(model, tuned_options(compiled=True))),
    "vllm-tuned-iomp": _http(lambda model: vllm_serve(model, tuned_options(iomp=True))),
    "vllm-tuned-compiled-iomp": _http(
        lambda model: vllm_serve(model, tuned_options(compiled=True, iomp=True))
    ),
    "zentorch": _http(lambda model: vllm_serve(model, zentorch_options())),
    LLAMA_CPP: _http(partial(llama_cpp, weights="bf16")),
    "llama-cpp-int8": _http(partial(llama_cpp, weights="q8_0")),
    SERVE_LLM: _http(serve_llm),
    SERVE_LLM_TUNED: _http(partial(serve_llm, tuned=True)),
}
TUNED_VLLM = (VLLM_TUNED, *(name for name in TARGETS if name.startswith((f"{VLLM_TUNED}-", "zen"))))
"""Variants of vLLM's tuned server; the fastest one of each round is the peer."""
DEFAULT_TARGETS = (
    *(CLUSTER, IN_PROCESS, VLLM, VLLM_TUNED, "vllm-tuned-compiled", "vllm-tuned-iomp"),
    *(SERVE_LLM, SERVE_LLM_TUNED),
)
QUICK_TARGETS = (CLUSTER, VLLM_TUNED, IN_PROCESS)


def prepare_model() -> str:
    """Build the default models if they are missing; return the directory of the LLM."""
    if subprocess.run([TANDEM, "models", "build"], check=False).returncode:
        raise TargetError("Cannot build the default models; see the output above.")
    return resolve(MODEL)
