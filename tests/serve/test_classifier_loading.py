"""Loading of models: precision, heads, and models that cannot be served."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import BertModel

from cluster.engines.classifier import make_classifier_engine
from cluster.engines.classifier.engine import ClassifierEngine
from cluster.engines.classifier.model import build, device
from cluster.engines.classifier.model.agreement import Agreement
from cluster.engines.classifier.model.check_texts import FILE
from cluster.errors import ConfigError
from tests.serve.classifier_kit import config, one_thread, post, serving  # noqa: F401
from tests.serve.word_bert import TEXTS, expected, make_distilbert, make_word_tokenizer, save_model


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))


def with_check_texts(path, word_network, texts):
    found = save_model(path, word_network)
    (path / FILE).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
async def test_low_precision_is_close_and_reports_its_agreement(
    own_home, tmp_path, word_network, dtype
):
    path = with_check_texts(tmp_path / "model", word_network, TEXTS)
    async with serving(config(dtype=dtype), path) as engine:
        encoded = await engine.service.encode("classify", TEXTS)
        assert engine.counts().agreement == 1
    np.testing.assert_allclose(encoded.rows, expected(word_network, TEXTS)[0], atol=0.1)


async def test_disagreeing_low_precision_is_refused_or_replaced_by_float32(
    own_home, tmp_path, word_network, monkeypatch
):
    path = with_check_texts(tmp_path / "model", word_network, TEXTS)
    monkeypatch.setattr(build, "measure_agreement", lambda *_: Agreement(0.9, len(TEXTS)))
    monkeypatch.setattr(device, "has_native_bfloat16", lambda: True)
    with pytest.raises(ConfigError, match=r"bfloat16 agrees with float32 on 90\.00% of 7 answers"):
        await ClassifierEngine(config(dtype="bfloat16"), path).start()
    async with serving(config(dtype="auto"), path) as engine:
        encoded = await engine.service.encode("classify", TEXTS)
        assert engine.counts().agreement is None
    np.testing.assert_allclose(encoded.rows, expected(word_network, TEXTS)[0], atol=1e-5)


async def test_int8_supports_only_bert(own_home, tmp_path):
    path = save_model(tmp_path / "model", make_distilbert())
    with pytest.raises(ConfigError, match="int8 is for BERT"):
        await ClassifierEngine(config(dtype="int8"), path).start()


async def test_a_model_without_a_head_only_embeds(tmp_path, word_network):
    path = save_model(tmp_path, BertModel(word_network.config))
    engine = make_classifier_engine(config(tasks=("embed",)), resolve=lambda _: path)
    assert "/v1/embeddings" in engine.routes()
    assert "/classify" not in engine.routes()
    await engine.start()
    assert (await post(engine, "/v1/embeddings", {"input": "good"})).status_code == 200
    assert (await post(engine, "/classify", {"input": "good"})).status_code == 404
    await engine.stop()
    with pytest.raises(ConfigError, match="SequenceClassification"):
        await ClassifierEngine(config(), path).start()


async def test_tokens_without_an_embedding_are_a_config_error(tmp_path, word_network):
    path = save_model(tmp_path, word_network)
    tokenizer = make_word_tokenizer()
    tokenizer.add_tokens(["<user>"])
    tokenizer.save_pretrained(path)
    with pytest.raises(ConfigError, match="tokens up to 14, the model up to 13"):
        await ClassifierEngine(config(), path).start()


async def test_a_missing_model_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot load"):
        await ClassifierEngine(config(), str(tmp_path / "none")).start()


async def test_weights_must_be_safetensors(tmp_path, word_network, word_model_path):
    shutil.copytree(word_model_path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    torch.save(word_network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"cannot load.*safetensors"):
        await ClassifierEngine(config(), str(tmp_path)).start()
