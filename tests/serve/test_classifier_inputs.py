"""Odd and invalid inputs of every endpoint, and the OpenAPI document."""

import json

import pytest

from tests.serve.classifier_kit import (  # noqa: F401
    ask,
    one_thread,
    post,
    refused,
    running,
    save,
)

HEADS = {
    "classify": ("ForSequenceClassification", "/classify", {}),
    "embed": ("", "/v1/embeddings", {}),
    "token-classification": ("ForTokenClassification", "/token-classification", {}),
    "fill-mask": ("ForMaskedLM", "/fill-mask", {}),
    "next-sentence": ("ForNextSentencePrediction", "/next-sentence", {}),
    "score": ("ForSequenceClassification", "/score", {"labels": {0: "relevance"}}),
    "rerank": ("ForSequenceClassification", "/rerank", {"labels": {0: "relevance"}}),
}
MAX_TEXTS = 10


@pytest.fixture(scope="module", params=HEADS)
def task(request):
    return request.param


@pytest.fixture(scope="module")
def saved(tmp_path_factory, task):
    head, _, changes = HEADS[task]
    return save(tmp_path_factory.mktemp(task), "bert", head, **changes)


@pytest.fixture
async def engine(saved, task):
    async with running(saved, task, max_texts=MAX_TEXTS) as engine:
        yield engine


def body(task, texts):
    """Return a request of ``task`` that contains ``texts``."""
    if task == "next-sentence":
        return {"input": [["good film", text] for text in texts]}
    if task == "fill-mask":
        return {"input": [f"[MASK] {text}" for text in texts]}
    if task == "score":
        return {"text_1": "good film", "text_2": texts}
    if task == "rerank":
        return {"query": "good film", "documents": texts}
    return {"input": texts}


def entries(answer):
    return answer["results"] if "results" in answer else answer["data"]


ODD = ["", " ", "\x00\x07\x1f\x7f", "\u200b\ufffe\U0001f600", "\r\n\t", "e\u0301" * 20, "x" * 500]


async def test_odd_texts_are_answered_in_order(engine, task):
    together = entries(await ask(engine, HEADS[task][1], body(task, ODD)))
    assert sorted(item["index"] for item in together) == list(range(len(ODD)))
    by_index = {item["index"]: item for item in together}
    for index, text in enumerate(ODD):
        (alone,) = entries(await ask(engine, HEADS[task][1], body(task, [text])))
        assert rounded({**alone, "index": index}) == rounded(by_index[index])


def rounded(value):
    if isinstance(value, float):
        return pytest.approx(value, abs=1e-5)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


async def test_a_very_long_text_is_refused_or_cut(engine, task):
    text = "good film " * 10_000
    path = HEADS[task][1]
    given = body(task, [text])
    error = await refused(engine, path, {**given, "truncate": False}, 400)
    assert "tokens; the model takes 40" in error["message"]
    for truncate in (True, "right"):
        answer = await ask(engine, path, {**given, "truncate": truncate})
        assert answer["usage"]["total_tokens"] == 40


async def test_empty_and_too_long_lists_are_refused(engine, task):
    path = HEADS[task][1]
    assert "is empty" in (await refused(engine, path, body(task, []), 400))["message"]
    assert len(entries(await ask(engine, path, body(task, ["good"] * MAX_TEXTS)))) == MAX_TEXTS
    error = await refused(engine, path, body(task, ["good"] * (MAX_TEXTS + 1)), 400)
    assert "has 11 texts; a request may have 10" in error["message"]


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"null", 400),
        (b"[]", 400),
        (b'{"model": "\xff"}', 400),
        (b'{"model": "\\ud800"}', 400),
        (b'{"model": "\\udfff x"}', 400),
        (b'{"input": 3}', 400),
        (b'{"input": null}', 400),
        (b'{"input": [null]}', 400),
        (b'{"input": [["a", "b", "c"]]}', 400),
        (b'{"input": {"txt": "a"}}', 400),
        (b'{"query": 1, "documents": 2}', 400),
    ],
)
async def test_wrong_bodies_are_refused(engine, task, wrong, status):
    error = await refused(engine, HEADS[task][1], wrong, status)
    assert error["code"] == status
    assert error["message"]


async def test_another_models_name_is_not_found(engine, task):
    given = {**body(task, ["good"]), "model": "other"}
    assert (await refused(engine, HEADS[task][1], given, 404))["param"] == "model"


async def test_the_openapi_document_describes_requests_and_replies(engine, task):
    answer = await post(engine, "/openapi.json", {})
    document = answer.json()
    assert tuple(document["paths"]) == engine.routes()
    schemas = document["components"]["schemas"]
    assert json.dumps(document).count('"$ref": "#/components/schemas/') >= 2
    for path, item in document["paths"].items():
        operation = item["get" if path == "/info" else "post"]
        assert operation["summary"]
        assert operation["responses"]["200"]["content"]["application/json"]["schema"]
        if path != "/info":
            body = operation["requestBody"]["content"]["application/json"]["schema"]
            for reference in body.get("anyOf", [body]):
                name = reference["$ref"].rsplit("/", 1)[1]
                assert schemas[name]["properties"]
                assert schemas[name]["description"]
