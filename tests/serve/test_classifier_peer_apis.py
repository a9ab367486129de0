"""APIs of text-embeddings-inference, Infinity and Hugging Face's client, on classifiers."""

import asyncio
import contextlib
import socket

import numpy as np
import pytest
import torch
import uvicorn
from huggingface_hub import InferenceClient

from tests import asgi
from tests.serve.classifier_kit import (  # noqa: F401
    ask,
    one_thread,
    post,
    refused,
    running,
    save,
)
from tests.serve.test_classifier_router import Site

TEXTS = ["good film", "the plot went on"]
RANKED = {"query": "good film", "texts": ["the plot", "Berlin", "dull"]}


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return save(tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return save(tmp_path_factory.mktemp("masked"), "bert", "ForMaskedLM")


@pytest.fixture
async def engine(labels):
    async with running(labels, "classify", "embed") as engine:
        yield engine


@pytest.fixture
async def ranker(tmp_path):
    async with running(save(tmp_path, labels={0: "relevant"}), "score", "rerank") as engine:
        yield engine


def assert_same_labels(found, wanted):
    """Compare labels and scores, which batches of other sizes change in the last bits."""
    assert [item["label"] for item in found] == [item["label"] for item in wanted]
    scores = [[item["score"] for item in items] for items in (found, wanted)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


async def test_tei_predict(engine, labels):
    data = (await ask(engine, "/classify", {"input": TEXTS}))["data"]
    single = await ask(engine, "/predict", {"inputs": TEXTS[0]})
    assert_same_labels(single, data[0]["scores"])
    batch = await ask(engine, "/predict", {"inputs": [[text] for text in TEXTS]})
    for found, item in zip(batch, data, strict=True):
        assert_same_labels(found, item["scores"])
    pair = await ask(engine, "/predict", {"inputs": TEXTS})
    native = (await ask(engine, "/classify", {"input": [TEXTS]}))["data"][0]
    assert_same_labels(pair, native["scores"])
    raw = await ask(engine, "/predict", {"inputs": TEXTS[0], "raw_scores": True})
    assert {item["label"]: item["score"] for item in raw} == pytest.approx(
        dict(
            zip(("negative", "neutral", "positive"), labels.logits(TEXTS[0]).tolist(), strict=True)
        ),
        abs=1e-5,
    )
    cut = {"inputs": "good " * 90, "truncate": True, "truncation_direction": "Left"}
    assert len(await ask(engine, "/predict", cut)) == 3
    for wrong in ([], ["a", "b", "c"], [["a", "b", "c"]], [[]], ["a", ["b"]]):
        assert (await refused(engine, "/predict", {"inputs": wrong}, 400))["param"] == "inputs"


async def test_tei_embed(engine, labels):
    reply = (await ask(engine, "/v1/embeddings", {"input": TEXTS}))["data"]
    vectors = [item["embedding"] for item in reply]
    for inputs, wanted in ((TEXTS, vectors), (TEXTS[0], vectors[:1])):
        found = await ask(engine, "/embed", {"inputs": inputs})
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    short = await ask(engine, "/embed", {"inputs": TEXTS[0], "dimensions": 4})
    assert np.linalg.norm(short[0]) == pytest.approx(1, abs=1e-6)
    plain = await ask(engine, "/embed", {"inputs": TEXTS[0], "normalize": False})
    np.testing.assert_allclose(plain[0], labels.hidden(TEXTS[0]).mean(0), atol=1e-5)
    for text, rows in zip(TEXTS, await ask(engine, "/embed_all", {"inputs": TEXTS}), strict=True):
        np.testing.assert_allclose(rows, labels.hidden(text), atol=1e-5)
    error = await refused(engine, "/embed", {"inputs": "a", "prompt_name": "query"}, 400)
    assert error["param"] == "prompt_name"


async def test_tei_similarity(engine):
    inputs = {"source_sentence": TEXTS[0], "sentences": [TEXTS[0], TEXTS[1]]}
    vectors = np.array(await ask(engine, "/embed", {"inputs": inputs["sentences"]}))
    for path in ("/similarity", "/", "/pipeline/sentence-similarity"):
        found = await ask(engine, path, {"inputs": inputs, "parameters": {"truncate": True}})
        assert found == pytest.approx(vectors @ vectors[0], abs=1e-5)
    error = await refused(engine, "/similarity", {"inputs": {**inputs, "sentences": []}}, 400)
    assert error["param"] == "sentences"


async def test_tei_embed_sparse(masked):
    async with running(masked, "embed-sparse", "fill-mask") as engine:
        rows = await ask(engine, "/embed_sparse", {"inputs": TEXTS})
        assert rows == await ask(engine, "/", {"inputs": TEXTS})
    for text, terms in zip(TEXTS, rows, strict=True):
        with torch.inference_mode():
            logits = masked.network(**masked.tokenizer(text, return_tensors="pt")).logits[0]
        weights = torch.log1p(torch.relu(logits)).amax(0)
        expected = {int(i): float(weights[i]) for i in weights.nonzero()[:, 0]}
        assert {term["index"]: term["value"] for term in terms} == pytest.approx(expected, abs=1e-5)


async def test_tei_rerank(ranker):
    native = await ask(ranker, "/rerank", {"query": "good film", "documents": RANKED["texts"]})
    wanted = [(item["index"], item["relevance_score"]) for item in native["results"]]
    for path in ("/rerank", "/"):
        found = await ask(ranker, path, RANKED)
        assert [(item["index"], item["score"]) for item in found] == wanted
        assert "text" not in found[0]
    found = await ask(ranker, "/rerank", {**RANKED, "return_text": True, "raw_scores": True})
    assert [item["text"] for item in found] == [RANKED["texts"][index] for index, _ in wanted]
    assert [1 / (1 + np.exp(-item["score"])) for item in found] == pytest.approx(
        [score for _, score in wanted], abs=1e-5
    )


async def test_tei_tokenize_and_decode(engine, labels):
    (tokens,) = await ask(engine, "/tokenize", {"inputs": "good film"})
    ids = labels.tokenizer("good film")["input_ids"]
    assert [token["id"] for token in tokens] == ids
    assert tokens[0] == {
        "id": ids[0],
        "text": "[CLS]",
        "special": True,
        "start": None,
        "stop": None,
    }
    assert all("good film"[t["start"] : t["stop"]] == t["text"] for t in tokens[1:-1])
    assert await ask(engine, "/decode", {"ids": ids}) == [labels.tokenizer.decode(ids[1:-1])]
    rows = await ask(engine, "/decode", {"ids": [ids, ids[1:3]], "skip_special_tokens": False})
    assert rows == [labels.tokenizer.decode(row) for row in (ids, ids[1:3])]


async def test_tei_info(labels):
    async with running(labels, "classify", "embed", max_texts=7) as engine:
        async with asyncio.timeout(60):
            answer = await asgi.get(engine.app, "/info")
        info = answer.json()
        assert info["model_id"] == "tiny"
        assert info["max_input_length"] == 40
        assert info["max_client_batch_size"] == 7
        assert info["model_type"]["classifier"]["id2label"]["2"] == "positive"
        assert (await post(engine, "/info", {})).status_code == 405


async def test_infinity(engine, ranker):
    data = (await ask(engine, "/classify", {"input": TEXTS}))["data"]
    body = {"model": "default/not-specified", "input": TEXTS, "raw_scores": False}
    answer = await ask(engine, "/classify", body)
    assert answer["object"] == "classify"
    for found, item in zip(answer["data"], data, strict=True):
        assert_same_labels(found, item["scores"])
    assert answer.keys() == {"object", "data", "model", "usage", "id", "created"}
    embedded = await ask(
        engine,
        "/embeddings",
        {"model": "default/not-specified", "input": TEXTS, "modality": "text"},
    )
    assert embedded["data"] == (await ask(engine, "/v1/embeddings", {"input": TEXTS}))["data"]
    body = {"query": "good", "documents": ["film", "plot"], "raw_scores": False, "top_n": 1}
    ranked = await ask(ranker, "/rerank", {**body, "return_documents": True})
    assert ranked["object"] == "rerank"
    (best,) = ranked["results"]
    assert best["document"] == body["documents"][best["index"]]
    assert (await ask(ranker, "/rerank", body))["results"][0]["document"] is None


@contextlib.asynccontextmanager
async def listening(app):
    """Serve an ASGI application on a free port of the loopback interface; yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        serving = asyncio.create_task(server.serve([free]))
        try:
            yield f"http://127.0.0.1:{free.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


async def test_hugging_faces_client_works_through_the_router(tmp_path):
    async with Site(tmp_path) as site, listening(site.app) as url:

        def call(pool, method, *args, path="", **options):
            client = InferenceClient(model=f"{url}/models/{pool}{path}", timeout=60)
            return asyncio.to_thread(getattr(client, method), *args, **options)

        native = (await ask(site.engines["labels"], "/classify", {"input": "good film"}))["data"][0]
        for path in ("", "/predict", "/pipeline/text-classification"):
            found = await call("labels", "text_classification", "good film", path=path)
            assert_same_labels([{**item} for item in found], native["scores"])
        (best,) = await call("labels", "text_classification", "good film", top_k=1)
        assert best.label == native["label"]
        raw = await call("labels", "text_classification", "a", function_to_apply="none")
        assert sum(item.score for item in raw) != pytest.approx(1)
        vector = (await ask(site.engines["labels"], "/embed", {"inputs": "good film"}))[0]
        for path in ("/embed", "/pipeline/feature-extraction"):
            found = await call("labels", "feature_extraction", "good film", path=path)
            assert found.shape == (1, 16)
            np.testing.assert_allclose(found[0], vector, atol=1e-6)
        scores = await call("labels", "sentence_similarity", "good film", other_sentences=TEXTS)
        assert scores[0] == pytest.approx(1, abs=1e-5)
        entities = await call("entities", "token_classification", "Anna Berger lives in Berlin")
        body = {"input": "Anna Berger lives in Berlin"}
        wanted = (await ask(site.engines["entities"], "/ner", body))["data"][0]["entities"]
        assert [(e.entity_group, e.word, e.start) for e in entities] == [
            (e["label"], e["text"], e["start"]) for e in wanted
        ]
        filled = await call("masks", "fill_mask", "the [MASK] film", top_k=2)
        assert len(filled) == 2
        assert filled[0].token_str in filled[0].sequence
        assert "[MASK]" not in filled[0].sequence


async def test_a_request_without_a_model_goes_to_the_only_pool_that_can_do_it(tmp_path):
    async with Site(tmp_path) as site:
        sentence = {"inputs": {"source_sentence": "a", "sentences": ["b"]}}
        for path, body in (
            ("/predict", {"inputs": "good"}),
            ("/embed", {"inputs": "good"}),
            ("/similarity", sentence),
            ("/classify", {"input": "good", "model": "default/not-specified"}),
            ("/rerank", RANKED),
            ("/pipeline/fill-mask", {"inputs": "the [MASK]"}),
        ):
            assert (await asgi.post(site.app, path, body)).status == 200, path
        for path, body in (("/", {"inputs": "good"}), ("/tokenize", {"inputs": "good"})):
            answer = await asgi.post(site.app, path, body)
            assert answer.status == 400
            assert "/models/MODEL" in answer.json()["error"]["message"]
            assert (await asgi.post(site.app, f"/models/labels{path}", body)).status == 200
        differing = {"inputs": "good", "model": "masks"}
        answer = await asgi.post(site.app, "/models/labels/predict", differing)
        assert answer.status == 400
        assert answer.json()["error"]["param"] == "model"
        assert (await asgi.get(site.app, "/models/labels/info")).json()["tasks"]
        probe = await asgi.get(site.app, "/")
        assert (probe.status, probe.headers["allow"]) == (405, "POST")
        assert (await asgi.post(site.app, "/models/unknown/predict", {})).status == 404
        models = (await asgi.get(site.app, "/models")).json()["data"]
        capabilities = {model["id"]: model["capabilities"] for model in models}
        assert capabilities["labels"] == ["embed", "classify"]
        assert capabilities["pairs"] == ["rerank"]
        known = (await asgi.get(site.app, "/openapi.json")).json()["paths"]
        assert {"/", "/predict", "/embed", "/similarity", "/info", "/pooling"} <= known.keys()


async def test_warnings_and_bytes_pass_the_router(tmp_path):
    async with Site(tmp_path) as site:
        body = {"input": ["good", "film"], "encoding_format": "bytes", "colour": 1}
        answer = await asgi.post(site.app, "/v1/embeddings", body)
        assert answer.status == 200
        assert answer.headers["x-tandem-warning"] == "ignored unknown fields: colour"
        assert "metadata" in answer.headers
        plain = await asgi.post(site.app, "/v1/embeddings", {"input": ["good", "film"]})
        rows = np.array([item["embedding"] for item in plain.json()["data"]], np.float32)
        np.testing.assert_array_equal(np.frombuffer(answer.body, "<f4").reshape(2, -1), rows)
