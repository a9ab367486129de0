"""Explanations, calibration and drift behind the HTTP API."""

import shutil

import numpy as np
import pytest

from cluster.config import ClassifierConfig
from cluster.engines.classifier.engine import ClassifierEngine
from cluster.engines.classifier.explain.attribution import ExplainModel
from cluster.errors import ConfigError
from cluster.models import calibration, reference
from cluster.models.calibration import Calibration
from tests.serve import classifier_kit
from tests.serve.planted import texts

CONFIG = ClassifierConfig(name="mine", model="mine", threads=1, dtype="float32")


def running(path):
    return classifier_kit.serving(CONFIG, str(path))


async def post(engine, body, path="/classify"):
    return await classifier_kit.post(engine, path, body)


@pytest.fixture
async def engine(trained):
    async with running(trained[0]) as engine:
        yield engine


async def test_explanations_are_added_to_the_scores(engine):
    plain = (await post(engine, {"input": "word1 REFUND"})).json()
    answer = (await post(engine, {"input": "word1 REFUND", "explain": True})).json()
    item = answer["data"][0]
    assert "explanation" not in plain["data"][0]
    assert item["scores"] == plain["data"][0]["scores"]
    assert item["explanation"]["method"] == "integrated_gradients"
    assert item["explanation"]["words"][1] == {"text": "REFUND", "start": 6, "end": 12}
    for row, score in zip(item["explanation"]["labels"], item["scores"], strict=True):
        assert row["label"] == score["label"]
        assert row["score"] == pytest.approx(score["score"], abs=1e-5)
        assert sum(row["contributions"]) == pytest.approx(row["score"] - row["baseline"], rel=0.02)
    assert "weights" not in item["explanation"]


async def test_methods_lists_and_top_k(engine):
    body = {"input": ["thanks", "refund word2"], "explain": {"method": "rollout"}}
    for item in (await post(engine, body)).json()["data"]:
        assert sum(item["explanation"]["weights"]) == pytest.approx(1)
        assert "labels" not in item["explanation"]
    body = {"input": ["thanks", "refund word2"], "explain": {}, "top_k": 1}
    for item in (await post(engine, body)).json()["data"]:
        assert [row["label"] for row in item["explanation"]["labels"]] == [item["label"]]


@pytest.mark.parametrize(
    ("body", "status", "says", "param"),
    [
        ({"input": ["a"] * 17, "explain": True}, 400, "may have 16", "input"),
        ({"input": "a", "explain": {"method": "guess"}}, 400, "explain.method", "explain.method"),
        ({"input": "a", "explain": {"steps": 3}}, 400, "steps", "explain"),
        ({"input": "a", "explain": "yes"}, 400, "explain", "explain"),
        ({"input": "word1 " * 40, "explain": True}, 400, "42 tokens", "input"),
        ({"input": "a", "explain": True, "stride": 4}, 400, "exclude each other", "explain"),
    ],
)
async def test_bad_explanation_requests_are_refused(engine, body, status, says, param):
    answer = await post(engine, body)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param


async def test_explanations_cover_the_part_that_was_read(engine):
    body = {"input": "word1 " * 40, "explain": True, "truncate": True}
    item = (await post(engine, body)).json()["data"][0]
    assert len(item["explanation"]["words"]) == 30
    body = {"input": "word1 " * 40 + "refund", "explain": True, "truncate": "left"}
    item = (await post(engine, body)).json()["data"][0]
    assert item["explanation"]["words"][-1]["text"] == "refund"
    assert item["explanation"]["labels"][0]["score"] == pytest.approx(item["score"], abs=1e-5)
    pair = await post(engine, {"input": {"text": "word1", "text_pair": "refund"}, "explain": True})
    item = pair.json()["data"][0]
    assert item["explanation"]["words"][1]["in_pair"] is True
    assert item["explanation"]["labels"][0]["score"] == pytest.approx(item["score"], abs=1e-5)


async def test_plain_requests_load_no_explaining_model(engine, monkeypatch):
    loads, load = [], ExplainModel.load

    def counting(*args):
        loads.append(args)
        return load(*args)

    monkeypatch.setattr(ExplainModel, "load", counting)
    await post(engine, {"input": "thanks"})
    assert not loads
    await post(engine, {"input": "thanks", "explain": True})
    assert len(loads) == 1


async def test_calibration_divides_the_logits(tmp_path, trained, engine):
    path = shutil.copytree(trained[0], tmp_path / "model")
    calibration.write(path, Calibration(3.0, 0.2, 0.01, 500))
    body = {"input": ["word1 refund", "thanks"], "explain": True}
    plain = (await post(engine, body)).json()["data"]
    async with running(path) as calibrated:
        cooler = (await post(calibrated, body)).json()["data"]
    for before, after in zip(plain, cooler, strict=True):
        assert after["label"] == before["label"]
        odds = np.log(before["score"] / (1 - before["score"]))
        assert np.log(after["score"] / (1 - after["score"])) == pytest.approx(odds / 3, rel=1e-3)
        assert after["explanation"]["labels"][0]["score"] == pytest.approx(after["score"], abs=1e-5)
    (path / calibration.FILE).write_text("{}")
    with pytest.raises(ConfigError, match="temperature"):
        await ClassifierEngine(CONFIG, str(path)).start()


async def test_drift_is_measured_against_the_reference(tmp_path, trained):
    path = shutil.copytree(trained[0], tmp_path / "model")
    rows = list(texts(600, seed=11))
    async with running(path) as engine:
        await post(engine, {"input": [text for text, _ in rows]})
        counted = engine.drift()
    assert counted.num_texts == 600
    assert counted.labels == {
        name: sum(label == name for _, label in rows) for name in ("complaint", "praise")
    }
    assert counted.drift is None
    known = reference.Reference(counted.labels, list(counted.confidence), list(counted.length))
    known.write(path)
    async with running(path) as engine:
        await post(engine, {"input": [text for text, _ in texts(600, seed=12)]})
        alike = engine.drift().drift
        await post(engine, {"input": ["thanks"] * 4000})
        await post(engine, {"input": "thanks"}, "/v1/embeddings")
        changed = engine.drift()
    assert max(alike.labels, alike.length) < 0.1
    assert changed.drift.labels > 0.25
    assert changed.drift.length > 0.25
    assert changed.num_texts == 4600
