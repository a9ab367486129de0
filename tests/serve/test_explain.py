import asyncio
import threading

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
)

from cluster.engines.classifier.explain.attribution import ExplainModel
from cluster.engines.classifier.explain.explainer import MAX_OPEN, Explainer
from cluster.engines.classifier.explain.schema import Question
from cluster.errors import InternalError, OverloadedError, UnavailableError
from tests.serve import tiny_bert
from tests.serve.classifier_kit import (  # noqa: F401
    FAMILIES,
    LABELS,
    PAIRS,
    TEXTS,
    one_thread,
    save,
    until,
)
from tests.serve.planted import FILLER, LABEL_OF_WORD, texts

GRADIENTS, ROLLOUT, BEST = Question(), Question("rollout"), Question(top_k=1)


def nothing():
    pass


@pytest.fixture(scope="module")
def model(trained):
    return ExplainModel.load(str(trained[0]), torch.device("cpu"), max_tokens=32)


def test_the_planted_word_is_found_and_the_contributions_add_up(model):
    for text, label in texts(20, seed=3):
        found = model.explain(text, GRADIENTS, nothing)
        assert [word.text for word in found.words] == text.split()
        assert found.labels[0].label == label
        assert found.labels[0].score > 0.9
        for row in found.labels:
            difference = row.score - row.baseline
            assert sum(row.contributions) == pytest.approx(difference, rel=0.02)
            assert row.error == pytest.approx(sum(row.contributions) - difference, abs=1e-9)
            strongest = found.words[int(np.abs(row.contributions).argmax())].text
            assert LABEL_OF_WORD[strongest] == label


def test_offsets_are_characters_of_the_text(model):
    text = "  Wörd1, \U0001f600 REFUND\tthanks!"
    for found in (model.explain(text, BEST, nothing), model.explain(text, ROLLOUT, nothing)):
        words = [(word.text, word.start, word.end) for word in found.words]
        assert all(text[start:end] == word for word, start, end in words)
        assert [word for word, _, _ in words] == [
            "Wörd1",
            ",",
            "\U0001f600",
            "REFUND",
            "thanks",
            "!",
        ]


def test_top_k_selects_the_best_labels(model):
    every = model.explain("word1 refund", GRADIENTS, nothing)
    best = model.explain("word1 refund", BEST, nothing)
    assert len(every.labels) == 2
    assert [row.label for row in best.labels] == [every.labels[0].label]
    assert best.labels[0].contributions == pytest.approx(every.labels[0].contributions, abs=0.01)
    scores = [row.score for row in every.labels]
    assert sum(scores) == pytest.approx(1)
    assert scores == sorted(scores, reverse=True)


def test_pairs_and_truncation_sides(model):
    pair = "word1 word2", "refund word3"
    found = model.explain(pair, GRADIENTS, nothing)
    assert [(w.text, w.start, w.in_pair) for w in found.words] == [
        ("word1", 0, False), ("word2", 6, False), ("refund", 0, True), ("word3", 7, True),
    ]  # fmt: skip
    row = found.labels[0]
    assert sum(row.contributions) == pytest.approx(row.score - row.baseline, rel=0.02)
    text = "word1 " * 30 + "refund"
    left, right = (model.explain(text, Question(side=s), nothing).words for s in ("left", "right"))
    assert len(left) == len(right) + 1 - 2 == 29
    assert (left[-1].text, left[-1].start) == ("refund", 180)
    assert right[0].start == 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # DeBERTa's, as imported
@pytest.mark.parametrize("family", FAMILIES)
def test_the_explained_score_is_the_classifiers(tmp_path, family):
    saved = save(tmp_path, family, max_tokens=60)
    model = ExplainModel.load(saved.path, torch.device("cpu"), max_tokens=60)
    for text in [*TEXTS, *PAIRS]:
        parts = (text,) if isinstance(text, str) else text
        logits = saved.logits(*parts)
        best = int(logits.argmax())
        found = model.explain(text, BEST, nothing)
        assert found.labels[0].label == LABELS[best]
        assert found.labels[0].score == pytest.approx(logits.softmax(-1)[best].item(), abs=1e-5)
        rolled = model.explain(text, ROLLOUT, nothing)
        assert sum(rolled.weights) == pytest.approx(1 if rolled.words else 0)
        for word in found.words:
            assert parts[word.in_pair][word.start : word.end] == word.text
            assert word.text.strip() == word.text


@pytest.mark.parametrize("text", ["", " ", "\x00", "word1 " * 100])
def test_odd_texts_have_an_explanation(model, text):
    found = model.explain(text, GRADIENTS, nothing)
    assert len(found.words) == len(found.labels[0].contributions) <= 30
    rolled = model.explain(text, ROLLOUT, nothing)
    assert sum(rolled.weights) == pytest.approx(1 if rolled.words else 0)


def test_rollout_finds_the_planted_word_more_often_than_chance(model):
    rows = [(model.explain(text, ROLLOUT, nothing), text) for text, _ in texts(20, seed=4)]
    found = [row.words[int(np.argmax(row.weights))].text in LABEL_OF_WORD for row, _ in rows]
    assert sum(found) > 10  # of 20; by chance it would be one word in 4 to 9
    assert all(min(row.weights) > 0 and sum(row.weights) == pytest.approx(1) for row, _ in rows)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_other_kinds_of_scores_add_up_too(tmp_path, problem):
    config = tiny_bert.tiny_config(5 + len(FILLER), num_labels=2, problem_type=problem)
    path = tiny_bert.save(tmp_path, FILLER, network=BertForSequenceClassification(config))
    model = ExplainModel.load(str(path), torch.device("cpu"), 32)
    network = AutoModelForSequenceClassification.from_pretrained(path)
    text = "word1 word2 word3"
    inputs = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")
    with torch.inference_mode():
        logits = network(**inputs).logits[0]
    scores = logits if problem == "regression" else logits.sigmoid()
    found = model.explain(text, GRADIENTS, nothing)
    by_label = {row.label: row for row in found.labels}
    for name, score in zip(("LABEL_0", "LABEL_1"), scores.tolist(), strict=True):
        assert by_label[name].score == pytest.approx(score, abs=1e-5)
        difference = by_label[name].score - by_label[name].baseline
        assert sum(by_label[name].contributions) == pytest.approx(difference, rel=0.02, abs=1e-3)


class Slow:
    """Explaining model that waits at a gate before each text."""

    def __init__(self, model):
        self.model = model
        self.gate = threading.Semaphore(0)
        self.begun = 0

    def explain(self, text, question, check):
        self.begun += 1
        self.gate.acquire(timeout=30)
        check()
        return self.model.explain(text, question, check)


@pytest.fixture
async def slow(model):
    slow = Slow(model)
    explainer = Explainer(lambda: slow)
    yield slow, explainer
    slow.gate.release(1000)
    await explainer.stop()


async def test_open_explanations_are_limited(slow):
    slow, explainer = slow
    waiting = [
        asyncio.create_task(explainer.explain(["refund"], GRADIENTS)) for _ in range(MAX_OPEN)
    ]
    await until(lambda: slow.begun)
    with pytest.raises(OverloadedError, match="8 requests"):
        await explainer.explain(["refund"], GRADIENTS)
    slow.gate.release(100)
    assert len(await asyncio.gather(*waiting)) == MAX_OPEN
    assert len(await explainer.explain(["refund", "thanks"], BEST)) == 2


async def test_a_disconnect_ends_the_work(slow):
    slow, explainer = slow
    first = asyncio.create_task(explainer.explain(["refund"] * 9, GRADIENTS))
    second = asyncio.create_task(explainer.explain(["thanks"], GRADIENTS))
    await until(lambda: slow.begun)
    for task in (first, second):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    slow.gate.release(2)
    assert len(await explainer.explain(["refund"], GRADIENTS)) == 1
    assert slow.begun == 2


async def test_stop_fails_open_requests(slow):
    slow, explainer = slow
    open_ones = [asyncio.create_task(explainer.explain(["refund"], GRADIENTS)) for _ in range(3)]
    await until(lambda: slow.begun)
    stop = asyncio.create_task(explainer.stop())
    await asyncio.sleep(0)
    slow.gate.release(100)
    await stop
    for error in await asyncio.gather(*open_ones, return_exceptions=True):
        assert isinstance(error, UnavailableError)
    with pytest.raises(UnavailableError):
        await explainer.explain(["refund"], GRADIENTS)


async def test_the_model_is_loaded_on_first_use(model):
    loads = []

    def load():
        loads.append(1)
        if len(loads) == 1:
            raise OSError("secret path")
        return model

    explainer = Explainer(load)
    assert not loads
    with pytest.raises(InternalError, match="see the log"):
        await explainer.explain(["refund"], GRADIENTS)
    for question in (GRADIENTS, ROLLOUT):
        assert (await explainer.explain(["refund"], question))[0].method == question.method
    assert len(loads) == 2
    await explainer.stop()
    await explainer.stop()
