"""LoRA adapters in real vLLM, compared with models that have the adapter merged."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import GeneratorConfig
from cluster.engines.factory import make_generator_engine
from cluster.engines.vllm import adapters
from cluster.models import store
from tests import asgi
from tests.cluster.tiny_llama import make_tiny_llama

RANK, SCALE = 4, 8
IDS = list(range(100, 140))
COMPLETION = "/v1/completions"

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # vLLM's imports warn
]


def make_adapter(directory: Path, model: Any, seed: int, rank: int = RANK) -> None:
    """Write a random LoRA adapter for the query and value projections, in PEFT's format."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    torch.manual_seed(seed)
    weights = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            key = f"base_model.model.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(rank, module.in_features) * 0.2
            weights[f"{key}.lora_B.weight"] = torch.randn(module.out_features, rank) * 0.2
    save_file(weights, directory / "adapter_model.safetensors")
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank * SCALE,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(adapter_config), encoding="utf-8")


def greedy(directory: Path, adapter: Path | None, count: int) -> list[int]:
    """Return transformers' greedy continuation of ``IDS`` with the adapter merged."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    changes = {} if adapter is None else load_file(adapter / "adapter_model.safetensors")
    for key in [key for key in changes if ".lora_A." in key]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        change = changes[key.replace("lora_A", "lora_B")] @ changes[key]
        model.get_submodule(name).weight.data += SCALE * change
    generated = model.generate(torch.tensor([IDS]), max_new_tokens=count, do_sample=False)
    return generated[0, len(IDS) :].tolist()


async def test_adapters_generate_the_same_tokens_as_merged_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    make_tiny_llama(base, store.resolve("smollm2-135m-instruct"))
    model = AutoModelForCausalLM.from_pretrained(base)
    paths = {name: tmp_path / name for name in ("law", "art")}
    for seed, path in enumerate(paths.values()):
        make_adapter(path, model, seed)
    config = {
        "name": "m",
        "model": str(base),
        "adapters": {name: str(path) for name, path in paths.items()},
        "engine_args": {"max_loras": 1},
        "max_model_len": 256,
        "kv_cache_memory_bytes": "64MiB",
        "dtype": "float32",
    }
    engine = make_generator_engine(GeneratorConfig.model_validate(config))
    await engine.start()
    try:
        listed = (await asgi.get(engine.app, "/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == ["m", "law", "art"]
        found = {}
        for name in ("m", "law", "art", "law"):
            body = {"model": name, "prompt": IDS, "max_tokens": 8, "temperature": 0}
            body |= {"ignore_eos": True, "return_token_ids": True}
            answer = (await asgi.post(engine.app, COMPLETION, body)).json()
            assert answer["model"] == name
            ids = answer["choices"][0]["token_ids"]
            assert found.setdefault(name, ids) == ids
        body = {"model": "tax", "prompt": "Hi"}
        assert (await asgi.post(engine.app, COMPLETION, body)).status == 404
    finally:
        await engine.stop()
    assert found == {name: greedy(base, paths.get(name), 8) for name in ("m", "law", "art")}
    assert len(set(map(tuple, found.values()))) == 3


async def test_adapters_are_added_and_removed_while_the_engine_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(adapters, "REMOVAL_DELAY_S", 0.0)
    base, wide = tmp_path / "base", tmp_path / "wide"
    make_tiny_llama(base, store.resolve("smollm2-135m-instruct"))
    make_tiny_llama(wide, store.resolve("smollm2-135m-instruct"), hidden_size=256)
    model = AutoModelForCausalLM.from_pretrained(base)
    make_adapter(tmp_path / "law", model, 0)
    make_adapter(tmp_path / "art", model, 1)
    make_adapter(tmp_path / "rank", model, 2, rank=64)
    make_adapter(tmp_path / "other-base", AutoModelForCausalLM.from_pretrained(wide), 3)
    (tmp_path / "empty").mkdir()
    config = GeneratorConfig.model_validate(
        {
            "name": "m",
            "model": str(base),
            "engine_args": {"max_loras": 1},
            "max_model_len": 256,
            "kv_cache_memory_bytes": "64MiB",
            "dtype": "float32",
        }
    )
    engine = make_generator_engine(config)

    async def apply(**paths: str) -> None:
        found = {name: str(tmp_path / path) for name, path in paths.items()}
        await engine.reconfigure(config.model_copy(update={"adapters": found}))

    async def generate(name: str) -> list[int] | int:
        body = {"model": name, "prompt": IDS, "max_tokens": 8, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        answer = await asgi.post(engine.app, COMPLETION, body)
        return answer.json()["choices"][0]["token_ids"] if answer.status == 200 else answer.status

    await engine.start()
    try:
        assert await generate("law") == 404
        await apply(law="law")
        assert await generate("law") == greedy(base, tmp_path / "law", 8)
        bad = {name: name for name in ("rank", "other-base", "empty", "missing")}
        await apply(law="law", **bad)
        assert engine.adapters.loaded == {"law": str(tmp_path / "law")}
        assert engine.adapters.failed.keys() == bad.keys()
        assert all(engine.adapters.failed.values())
        assert "64" in engine.adapters.failed["rank"]
        assert [await generate(name) for name in bad] == [404] * len(bad)
        assert await generate("law") == greedy(base, tmp_path / "law", 8)
        await engine.check_health()
        await apply(law="art")  # another adapter of this name
        assert await generate("law") == greedy(base, tmp_path / "art", 8)
        await apply()
        await asyncio.sleep(0)
        assert await generate("law") == 404
        assert await generate("m") == greedy(base, None, 8)
        assert (engine.adapters.loaded, engine.adapters.failed) == ({}, {})
    finally:
        await engine.stop()
