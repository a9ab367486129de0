"""Servers that ``bench engine`` compares, by the names in its options and tables."""

import subprocess
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from benchmarks.endpoint import TargetError
from benchmarks.targets.running import ReadyTarget
from benchmarks.targets.serve_llm import serve_llm
from benchmarks.targets.tandem import TANDEM, tandem_default
from benchmarks.targets.vllm import vllm_serve
from cluster.models.store import resolve

CLUSTER = "cluster"
VLLM_SERVE = "vllm-serve"
SERVE_LLM = "serve-llm"
MODEL = "smollm2-135m-instruct"

TARGETS: Mapping[str, Callable[[str], AbstractContextManager[ReadyTarget]]] = {
    CLUSTER: lambda _: tandem_default(),
    VLLM_SERVE: vllm_serve,
    SERVE_LLM: serve_llm,
}
"""Start functions; the argument is the model's directory."""


def prepare_model() -> str:
    """Build the default models if they are missing; return the directory of the LLM."""
    if subprocess.run([TANDEM, "models", "build"], check=False).returncode:
        raise TargetError("Cannot build the default models; see the output above.")
    return resolve(MODEL)
