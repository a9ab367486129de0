"""Scores and embeddings of one model, against transformers one text at a time."""

import asyncio
import base64
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.engines.classifier.serving.tasks.embed import Embed
from tests.serve.classifier_kit import config, one_thread, post, serving  # noqa: F401
from tests.serve.word_bert import (
    LABELS,
    MAX_TOKENS,
    TEXTS,
    WORDS,
    expected,
    make_bert,
    make_distilbert,
    make_roberta,
    make_word_tokenizer,
    save_model,
)


@pytest.fixture
async def engine(word_model_path):
    async with serving(config(), word_model_path) as engine:
        yield engine


async def test_classify_returns_the_scores_of_transformers(engine, word_network):
    answer = (await post(engine, "/classify", {"model": "tiny", "input": TEXTS})).json()
    scores, _ = expected(word_network, TEXTS)
    assert (answer["object"], answer["model"]) == ("list", "tiny")
    names = list(LABELS["id2label"].values())
    for index, item in enumerate(answer["data"]):
        assert item["index"] == index
        found = [pair["score"] for pair in item["scores"]]
        assert found == sorted(found, reverse=True)
        by_label = {pair["label"]: pair["score"] for pair in item["scores"]}
        assert [by_label[name] for name in names] == pytest.approx(scores[index], abs=1e-5)
        assert (item["label"], item["score"]) == (item["scores"][0]["label"], found[0])
    lengths = [len(ids) for ids in make_word_tokenizer()(TEXTS)["input_ids"]]
    assert answer["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}


async def test_top_k_limits_the_scores(engine):
    for top_k, count in ((1, 1), (2, 2), (9, 3), (None, 3)):
        answer = (await post(engine, "/classify", {"input": "good", "top_k": top_k})).json()
        assert len(answer["data"][0]["scores"]) == count


async def test_embeddings_are_mean_pooled_at_unit_length(engine, word_network):
    answer = (await post(engine, "/v1/embeddings", {"input": TEXTS})).json()
    _, vectors = expected(word_network, TEXTS)
    found = np.array([item["embedding"] for item in answer["data"]])
    assert [item["index"] for item in answer["data"]] == list(range(len(TEXTS)))
    np.testing.assert_allclose(found, vectors, atol=1e-5)


async def test_embedding_formats_agree(engine):
    body = {"input": "good film", "user": "someone"}
    plain = (await post(engine, "/v1/embeddings", body)).json()["data"][0]["embedding"]
    coded = await post(engine, "/v1/embeddings", {**body, "encoding_format": "base64"})
    decoded = np.frombuffer(base64.b64decode(coded.json()["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(decoded, plain, atol=1e-6)
    short = await post(engine, "/v1/embeddings", {**body, "dimensions": 4})
    vector = np.array(short.json()["data"][0]["embedding"])
    np.testing.assert_allclose(vector, np.array(plain[:4]) / np.linalg.norm(plain[:4]), atol=1e-6)


@pytest.mark.parametrize(("texts", "aside"), [(2, False), (4096, True)])
async def test_only_large_replies_are_made_in_a_thread(engine, monkeypatch, texts, aside):
    threads = []
    plain = Embed.reply

    def reply(*args):
        threads.append(threading.get_ident())
        return plain(*args)

    monkeypatch.setattr(Embed, "reply", reply)
    answer = (
        await post(engine, "/v1/embeddings", {"input": ["good", "bad"] * (texts // 2)})
    ).json()
    assert (threads != [threading.get_ident()]) == aside
    data = answer["data"]
    assert [item["index"] for item in data] == list(range(texts))
    for item in (data[-2], data[-1]):
        assert item["embedding"] == pytest.approx(data[item["index"] % 2]["embedding"], abs=1e-6)


async def test_token_ids_give_the_embeddings_of_their_texts(engine):
    texts = ["good film", "the plot was dull"]
    ids = make_word_tokenizer()(texts)["input_ids"]
    by_text = (await post(engine, "/v1/embeddings", {"input": texts})).json()
    by_ids = (await post(engine, "/v1/embeddings", {"input": ids})).json()
    one = (await post(engine, "/v1/embeddings", {"input": ids[0]})).json()
    assert by_ids["usage"] == by_text["usage"]
    for left, right in zip(by_ids["data"], by_text["data"], strict=True):
        assert left["embedding"] == pytest.approx(right["embedding"], abs=1e-5)
    assert one["data"][0]["embedding"] == pytest.approx(by_text["data"][0]["embedding"], abs=1e-5)


async def test_replies_have_timing_headers(engine):
    headers = (await post(engine, "/classify", {"input": "good"})).headers
    for part in ("tokenize", "queue", "compute"):
        assert float(headers[f"x-tandem-{part}-ms"]) >= 0


@pytest.mark.parametrize(
    "text",
    ["film " * (MAX_TOKENS - 1), "film " * 20_000, "\x00" * 50, "", "\u200b\ufffe\U0001f600"],
)
async def test_odd_texts_are_classified(engine, text):
    answer = await post(engine, "/classify", {"input": text, "truncate": True})
    assert answer.status_code == 200
    assert 2 <= answer.json()["usage"]["total_tokens"] <= MAX_TOKENS


async def test_texts_are_cut_as_by_transformers(engine, word_network):
    text = " ".join(WORDS * 5)
    answer = (await post(engine, "/v1/embeddings", {"input": text, "truncate": True})).json()
    _, vectors = expected(word_network, [text])
    assert answer["data"][0]["embedding"] == pytest.approx(vectors[0], abs=1e-5)


@given(texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join), max_size=30))
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_scores_do_not_depend_on_concurrent_requests(word_model_path, word_network, texts):
    async def compare():
        async with serving(config(), word_model_path) as engine:
            one = (await engine.service.encode("classify", ["good film", *texts])).rows[0]
            await_all = [engine.service.encode("classify", [text]) for text in texts]
            rows = [encoded.rows[0] for encoded in await asyncio.gather(*await_all)]
            return one, rows

    one, rows = asyncio.run(compare())
    scores, _ = expected(word_network, ["good film", *texts])
    np.testing.assert_allclose([one, *rows], scores, atol=1e-5)


async def test_ten_thousand_texts_are_answered_in_order(engine, word_network):
    texts = [" ".join(WORDS[i % 10 : i % 10 + i % 7]) for i in range(10_000)]
    answer = await post(engine, "/classify", {"input": texts, "top_k": 1})
    assert answer.status_code == 200
    data = answer.json()["data"]
    scores, _ = expected(word_network, texts[:70])
    assert [item["index"] for item in data] == list(range(10_000))
    wanted = np.resize(scores.max(1), 10_000)
    np.testing.assert_allclose([item["score"] for item in data], wanted, atol=1e-5)


async def test_concurrent_requests_get_their_own_results(engine, word_network):
    texts = [" ".join(WORDS[i % 10 : i % 10 + i % 7]) for i in range(100)]
    scores, vectors = expected(word_network, texts)
    classify = [engine.service.encode("classify", [text]) for text in texts]
    embed = [engine.service.encode("embed", [text, "a"]) for text in texts]
    answers = await asyncio.gather(*classify, *embed)
    np.testing.assert_allclose([a.rows[0] for a in answers[:100]], scores, atol=1e-5)
    np.testing.assert_allclose([a.rows[0] for a in answers[100:]], vectors, atol=1e-5)
    assert engine.counts().texts == 300
    assert engine.counts().batches < 150
    assert engine.load().running == engine.load().waiting == 0


@pytest.mark.parametrize(
    ("problem_type", "activation"),
    [
        ("single_label_classification", lambda x: x.softmax(-1)),
        ("multi_label_classification", torch.sigmoid),
        ("regression", lambda x: x),
    ],
)
async def test_scores_follow_the_problem_type(tmp_path, problem_type, activation):
    network = make_bert(problem_type=problem_type)
    path = save_model(tmp_path, network)
    inputs = make_word_tokenizer()("good film", return_tensors="pt")
    with torch.inference_mode():
        wanted = activation(network(inputs["input_ids"]).logits)
    async with serving(config(), path) as engine:
        encoded = await engine.service.encode("classify", ["good film"])
    np.testing.assert_allclose(encoded.rows, wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize(("make", "limit"), [(make_distilbert, MAX_TOKENS), (make_roberta, 30)])
async def test_other_architectures(tmp_path, make, limit):
    torch.manual_seed(2)
    network = make().eval()
    path = save_model(tmp_path, network)
    texts = [text for text in TEXTS if len(text) < 40]
    scores, vectors = expected(network, texts)
    async with serving(config(), path) as engine:
        tokenizer = engine.service.model.tokenizer
        assert tokenizer.max_tokens == limit
        classified = await engine.service.encode("classify", texts)
        embedded = await engine.service.encode("embed", texts)
        longest = await engine.service.encode(
            "classify", ["film " * 50], tokenizer.readers["right"]
        )
    np.testing.assert_allclose(classified.rows, scores, atol=1e-5)
    np.testing.assert_allclose(embedded.rows, vectors, atol=1e-5)
    assert longest.num_tokens == limit
