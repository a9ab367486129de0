"""Pooling of embeddings by the files of sentence-transformers."""

import base64
import json

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError
from tests.serve.classifier_kit import (  # noqa: F401
    TEXTS,
    ask,
    one_thread,
    running,
    save,
)

MODES = {
    "cls_token": lambda hidden: hidden[0],
    "max_tokens": lambda hidden: hidden.amax(0),
    "mean_tokens": lambda hidden: hidden.mean(0),
    "mean_sqrt_len_tokens": lambda hidden: hidden.sum(0) / len(hidden) ** 0.5,
    "weightedmean_tokens": lambda hidden: weighted(hidden),
    "lasttoken": lambda hidden: hidden[-1],
}


def weighted(hidden):
    weights = torch.arange(1, len(hidden) + 1)[:, None].float()
    return (hidden * weights).sum(0) / weights.sum()


@pytest.fixture(params=["bert", "distilbert"])  # one packed, one padded
def saved(tmp_path, request):
    return save(tmp_path, request.param, "")


def write_modules(saved, modes, *further):
    """Write the files of sentence-transformers."""
    kinds = ["Transformer", "Pooling", *further]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{kind}" if index else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    write(saved, "modules.json", modules)
    options = {f"pooling_mode_{name}": name in modes for name in MODES}
    write(saved, "1_Pooling/config.json", {"word_embedding_dimension": 16, **options})


def write(saved, name, content):
    path = saved.directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


async def vectors(saved, **options):
    async with running(saved, "embed", max_batch_tokens=200) as engine:
        answer = await ask(engine, "/v1/embeddings", {"input": TEXTS, **options})
        return [item["embedding"] for item in answer["data"]]


@pytest.mark.parametrize("mode", MODES)
async def test_each_mode_without_normalizing(saved, mode):
    write_modules(saved, [mode])
    wanted = [MODES[mode](saved.hidden(text)).numpy() for text in TEXTS]
    np.testing.assert_allclose(await vectors(saved), wanted, atol=1e-5, rtol=1e-5)


async def test_several_modes_are_concatenated_at_unit_length(saved):
    write_modules(saved, ["mean_tokens", "cls_token"], "Normalize")
    hidden = [saved.hidden(text) for text in TEXTS]
    wanted = torch.stack([torch.cat([h[0], h.mean(0)]) for h in hidden])
    wanted = torch.nn.functional.normalize(wanted, dim=-1).numpy()
    np.testing.assert_allclose(await vectors(saved), wanted, atol=1e-5)
    coded = await vectors(saved, encoding_format="base64", dimensions=32)
    decoded = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in coded]
    np.testing.assert_allclose(decoded, wanted, atol=1e-5)
    short = await vectors(saved, dimensions=5)
    first = wanted[:, :5] / np.linalg.norm(wanted[:, :5], axis=1, keepdims=True)
    np.testing.assert_allclose(short, first, atol=1e-5)


async def test_the_default_is_the_mean_at_unit_length(saved):
    wanted = torch.stack([saved.hidden(text).mean(0) for text in TEXTS])
    wanted = torch.nn.functional.normalize(wanted, dim=-1).numpy()
    np.testing.assert_allclose(await vectors(saved), wanted, atol=1e-5)


async def test_unknown_modules_are_a_config_error(tmp_path):
    saved = save(tmp_path, "bert", "")
    write_modules(saved, ["mean_tokens"], "Dense")
    with pytest.raises(ConfigError, match=r"unsupported pooling modules in modules\.json: Dense"):
        await vectors(saved)
    write_modules(saved, [])
    write(saved, "1_Pooling/config.json", {"pooling_mode_attention": True})
    with pytest.raises(ConfigError, match="unsupported pooling modes: pooling_mode_attention"):
        await vectors(saved)
