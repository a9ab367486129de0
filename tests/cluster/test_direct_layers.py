"""Direct calls of a Llama layer's kernels give the same bits as vLLM's layers, in a real engine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.engines.vllm.environment import preload_environment
from cluster.models.store import resolve
from tests.cluster.tiny_llama import make_tiny_llama

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

ENGINE = """
import json
import sys

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

from cluster.engines.vllm.arguments import EAGER_CPU_WORKER
from cluster.engines.vllm.direct_layers import call_kernels_directly

options = json.loads(sys.argv[2])
engine = LLMEngine.from_engine_args(EngineArgs(
    sys.argv[1], enforce_eager=True, worker_cls=EAGER_CPU_WORKER, block_size=32, max_model_len=256,
    kv_cache_memory_bytes=2**25, enable_prefix_caching=False, max_num_batched_tokens=64, **options,
))
model = engine.model_executor.driver_worker.model_runner.get_model()
layers = [layer for layer in model.modules() if type(layer).__name__ == "LlamaDecoderLayer"]
direct = [vars(layer)["forward"] for layer in layers if "forward" in vars(layer)]

def generate(name):
    # Prompts of several lengths share steps, and long ones take several.
    for i, length in enumerate((1, 7, 33, 100)):
        params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True, logprobs=3)
        engine.add_request(f"{name}{i}", {"prompt_token_ids": [*range(50, 50 + length)]}, params)
    found = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            found[output.request_id.split("-")[0]] = [
                sorted((token, each.logprob) for token, each in step.items())
                for step in output.outputs[0].logprobs
            ]
    return [found[f"{name}{i}"] for i in range(4)]

ours = generate("ours")
for layer in layers:
    vars(layer).pop("forward", None)
theirs = generate("theirs")

def count(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        return call_kernels_directly(model)
    finally:
        setattr(owner, name, before)
        for layer in layers:
            vars(layer).pop("forward", None)

last = layers[-1]
declined = {} if not direct else {
    "all as usual": count(last, "hidden_size", last.hidden_size),
    "several workers": count(last.mlp.down_proj, "tp_size", 2),
    "quantized weights": count(last.mlp.down_proj, "quant_method", object()),
    "quantized cache": count(last.self_attn.attn, "kv_cache_dtype", "fp8"),
    "another activation": count(last.mlp, "act_fn", last.mlp.down_proj),
    "weights of another library": count(last.mlp.gate_up_proj, "cpu_linear", lambda x: x),
}
print("RESULT", json.dumps([len(direct), len(layers), ours == theirs, declined]))
"""


def run_engine(model: Path, **options: Any) -> list[Any]:
    command = [sys.executable, "-c", ENGINE, str(model), json.dumps(options)]
    environment = os.environ | preload_environment(os.environ)
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=280, env=environment
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout + done.stderr
    found: list[Any] = json.loads(lines[0].removeprefix("RESULT "))
    return found


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    make_tiny_llama(directory, resolve("smollm2-135m-instruct"))
    return directory


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.long)])
def test_layers_compute_the_same_bits_as_vllm(tiny_llama: Path, dtype: str) -> None:
    num_direct, num_layers, are_equal, declined = run_engine(tiny_llama, dtype=dtype)
    assert num_direct == num_layers == 2
    assert are_equal
    assert declined.pop("all as usual") == 2
    assert declined == dict.fromkeys(declined, 0)


@pytest.mark.long
def test_adapted_layers_stay_as_they_are(tiny_llama: Path) -> None:
    num_direct, num_layers, are_equal, _ = run_engine(tiny_llama, enable_lora=True)
    assert (num_direct, num_layers, are_equal) == (0, 2, True)
