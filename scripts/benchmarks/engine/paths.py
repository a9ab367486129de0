"""The servers that ``bench engine`` compares, by the names that its options and tables use."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.endpoint import TargetError
from benchmarks.targets.first_token import Ready
from benchmarks.targets.serve_llm import serve_llm
from benchmarks.targets.tandem_default import tandem_default
from benchmarks.targets.vllm_serve import vllm_serve
from cluster.models.store import resolve

CLUSTER = "cluster"
VLLM_SERVE = "vllm-serve"
SERVE_LLM = "serve-llm"
MODEL = "smollm2-135m-instruct"

TARGETS: Mapping[str, Callable[[str], AbstractContextManager[Ready]]] = {
    CLUSTER: lambda _: tandem_default(),
    VLLM_SERVE: vllm_serve,
    SERVE_LLM: serve_llm,
}
"""Each takes the model's directory."""


def prepare() -> str:
    """The model's directory; the default models are built now where they are missing."""
    tandem = Path(sys.executable).with_name("tandem")
    if subprocess.run([tandem, "models", "build"], check=False).returncode:
        raise TargetError("the default models cannot be built")
    return resolve(MODEL)
