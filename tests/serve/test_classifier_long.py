"""Long texts: cut on either side, or read in windows whose results are merged."""

import numpy as np
import pytest
import torch

from tests.serve.classifier_kit import (  # noqa: F401
    FAMILIES,
    LABELS,
    MAX_TOKENS,
    ask,
    one_thread,
    refused,
    running,
    save,
)

SENTENCES = "the good film was not a dull one. Anna Berger lives in Berlin, unforgettable. " * 6
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("bert"))


@pytest.fixture
async def engine(saved):
    async with running(saved, "classify", "embed") as engine:
        yield engine


def scores_of(item):
    by_label = {score["label"]: score["score"] for score in item["scores"]}
    return [by_label[label] for label in LABELS.values()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
async def test_texts_and_pairs_are_cut_as_by_transformers(tmp_path, family, side):
    saved = save(tmp_path, family)
    saved.tokenizer.truncation_side = side
    given = [SENTENCES, ("good film", SENTENCES), (SENTENCES, "good film"), (SENTENCES, SENTENCES)]
    async with running(saved, "classify") as engine:
        answer = await ask(engine, "/classify", {"input": given, "truncate": side})
    for item, text in zip(answer["data"], given, strict=True):
        texts = (text,) if isinstance(text, str) else text
        logits = saved.logits(*texts, truncation="longest_first", max_length=MAX_TOKENS)
        assert scores_of(item) == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
    assert answer["usage"]["total_tokens"] == 4 * MAX_TOKENS


@pytest.mark.parametrize("stride", [0, 7, 19])
@pytest.mark.parametrize("aggregate", ["mean", "max"])
async def test_labels_of_windows_are_merged(engine, saved, stride, aggregate):
    body = {"input": ["good", SENTENCES, ""], "stride": stride, "aggregate": aggregate}
    plain = await ask(engine, "/classify", body)
    answer = await ask(engine, "/classify", {**body, "windows": True})
    assert "windows" not in plain["data"][1]
    windows = saved.windows(SENTENCES, stride=stride)
    found = answer["data"][1]["windows"]
    assert [(w["start"], w["end"]) for w in found] == [window[:2] for window in windows]
    scores = torch.stack([logits.softmax(-1) for *_, logits in windows])
    for window, wanted in zip(found, scores, strict=True):
        assert scores_of(window) == pytest.approx(wanted.tolist(), abs=1e-5)
    merged = scores.mean(0) if aggregate == "mean" else scores.amax(0)
    for item in (answer["data"][1], plain["data"][1]):
        assert scores_of(item) == pytest.approx(merged.tolist(), abs=1e-5)
        assert item["score"] == item["scores"][0]["score"]
    assert [w["start"] for w in answer["data"][0]["windows"]] == [0]
    empty = answer["data"][2]
    assert [(w["start"], w["end"]) for w in empty["windows"]] == [(0, 0)]
    assert answer["usage"] == plain["usage"]
    tokens = len(saved.tokenizer(SENTENCES, add_special_tokens=False)["input_ids"])
    tokens += (len(windows) - 1) * stride + 2 * len(windows)  # overlaps and special tokens
    short = sum(len(saved.tokenizer(text)["input_ids"]) for text in ("good", ""))
    assert answer["usage"]["total_tokens"] == tokens + short


async def test_vectors_of_windows_are_merged_to_unit_length(engine, saved):
    body = {"input": [SENTENCES, "good"], "stride": 5, "windows": True}
    answer = await ask(engine, "/v1/embeddings", body)
    item = answer["data"][0]
    parts = np.array([window["embedding"] for window in item["windows"]])
    assert len(parts) == len(saved.windows(SENTENCES, stride=5))
    mean = parts.mean(0)
    np.testing.assert_allclose(item["embedding"], mean / np.linalg.norm(mean), atol=1e-5)
    short = await ask(engine, "/v1/embeddings", {**body, "dimensions": 4})
    first = np.array(item["embedding"][:4])
    wanted = first / np.linalg.norm(first)
    np.testing.assert_allclose(short["data"][0]["embedding"], wanted, atol=1e-5)


async def test_a_pair_is_read_in_windows_of_its_second_text(engine, saved):
    body = {"input": [["good film", SENTENCES]], "stride": 4, "windows": True}
    item = (await ask(engine, "/classify", body))["data"][0]
    wanted = saved.windows("good film", SENTENCES, stride=4)
    for window, (start, end, logits) in zip(item["windows"], wanted, strict=True):
        assert (window["start"], window["end"]) == (start, end)
        assert scores_of(window) == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
    assert item["windows"][-1]["end"] == len(SENTENCES.rstrip())


async def test_many_long_texts_keep_their_order(engine):
    texts = [SENTENCES[: 40 * (index % 7)] for index in range(50)]
    body = {"input": texts, "stride": 3}
    together = (await ask(engine, "/classify", body))["data"]
    for index in (0, 3, 6, 13, 49):
        alone = (await ask(engine, "/classify", {**body, "input": texts[index]}))["data"][0]
        assert scores_of(alone) == pytest.approx(scores_of(together[index]), abs=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "says", "param"),
    [
        ({"stride": 20}, 400, "stride is 20; the limit of this model is 19", "stride"),
        ({"stride": -1}, 400, ">= 0", "stride"),
        ({"stride": 5, "truncate": True}, 400, "exclude each other", "stride"),
        ({"windows": True}, 400, "needs a stride", "windows"),
        ({"stride": 5, "aggregate": "sum"}, 400, "aggregate", "aggregate"),
        ({"truncate": "middle"}, 400, "truncate", "truncate"),
    ],
)
async def test_impossible_windows_are_refused(engine, body, status, says, param):
    error = await refused(engine, "/classify", {"input": "good", **body}, status)
    assert says in error["message"]
    assert error["param"] == param


async def test_token_ids_have_no_windows(engine):
    error = await refused(engine, "/v1/embeddings", {"input": [5, 6], "stride": 3}, 400)
    assert error["param"] == "stride"
    body = {"input": [*range(5, 70)], "truncate": "left"}
    left = await ask(engine, "/v1/embeddings", body)
    same = await ask(engine, "/v1/embeddings", {"input": [*range(30, 70)]})
    assert left["data"][0]["embedding"] == pytest.approx(same["data"][0]["embedding"], abs=1e-5)
