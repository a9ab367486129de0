"""AutoRound quantizes a tiny generator; vLLM serves one in ``tests/cluster``."""

import json
from pathlib import Path

import pytest

from cluster.models.quantize import QuantizeOptions, packaged_texts, quantize, weights_bytes
from cluster.models.store import resolve
from tests.cluster.tiny_llama import make_tiny_llama

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_llama(directory, resolve("smollm2-135m-instruct"))
    return directory


def test_four_bit_weights_are_close_to_the_original_ones(original: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    out = tmp_path / "w4a16"
    quantize(original, out, QuantizeOptions("w4a16"), packaged_texts("calibration"))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert (weights["num_bits"], weights["group_size"], weights["type"]) == (4, 128, "int")
    name = "model.layers.1.mlp.up_proj"
    before = load_file(original / "model.safetensors")[f"{name}.weight"].float()
    after = load_file(out / "model.safetensors")
    # Eight values per 32 bits, offset by 8.
    packed, scale = after[f"{name}.weight_packed"], after[f"{name}.weight_scale"].float()
    values = torch.stack([packed >> shift & 15 for shift in range(0, 32, 4)], -1).flatten(1) - 8
    restored = (values.unflatten(1, (-1, 128)) * scale.unsqueeze(-1)).flatten(1)
    # Rounding to the nearest of 16 values is off by half a step at most.
    assert (restored - before).abs().mean() < scale.abs().mean() / 2
    assert weights_bytes(out) < weights_bytes(original)
