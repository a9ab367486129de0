"""Requests that a classifier refuses, and odd ways of sending them."""

import asyncio
import json

import pytest

from cluster.errors import InvalidRequestError
from tests.serve.classifier_kit import client, config, one_thread, post, serving  # noqa: F401
from tests.serve.word_bert import MAX_TOKENS


@pytest.fixture
async def engine(word_model_path):
    async with serving(config(), word_model_path) as engine:
        yield engine


LONG = "film " * (MAX_TOKENS - 1)
BAD = [
    ("/classify", b"", 400, "JSON", None),
    ("/classify", b'{"input": ', 400, "JSON", None),
    ("/classify", b'{"input": "\xff"}', 400, "UTF-8", None),
    ("/classify", b'{"input": "\\ud800"}', 400, "JSON", None),
    ("/classify", b'{"input": "\\udc00 x"}', 400, "surrogate", None),
    ("/classify", b'{"input": "\xed\xa0\x80"}', 400, "UTF-8", None),
    ("/classify", b"[" * 100_000, 400, "object", None),
    ("/classify", b'{"input": ' + b"[" * 100_000, 400, "input", "input[0][0]"),
    ("/classify", {"input": []}, 400, "input is empty", "input"),
    ("/classify", {}, 400, "`input`", "input"),
    ("/classify", {"input": 3}, 400, "input: expected", "input"),
    ("/classify", {"input": ["a", None]}, 400, "input[1]", "input[1]"),
    ("/classify", {"input": "a", "top_k": 0}, 400, ">= 1", "top_k"),
    ("/classify", {"input": "a", "top_k": True}, 400, "top_k", "top_k"),
    ("/classify", {"inputs": "b"}, 400, "`input`", "input"),
    ("/classify", {"input": "a", "truncate": "yes"}, 400, "truncate", "truncate"),
    ("/classify", {"input": "a", "model": "other"}, 404, "'tiny'", "model"),
    ("/classify", {"input": ["a"] * 10_001}, 400, "10000", "input"),
    ("/classify", {"input": LONG}, 400, "input[0] has 33 tokens; the model takes 32", "input"),
    ("/classify", {"input": ["a", "film " * 50]}, 400, "input[1] has 52 tokens", "input"),
    ("/classify", {"input": "a" + " a" * 50_000}, 400, "50003 tokens", "input"),
    ("/v1/embeddings", {"input": []}, 400, "input is empty", "input"),
    ("/v1/embeddings", {"input": [[]]}, 400, "input[0] is empty", "input"),
    ("/v1/embeddings", {"input": [1, "a"]}, 400, "cannot be mixed", "input"),
    ("/v1/embeddings", {"input": [[1], 2]}, 400, "cannot be mixed", "input"),
    ("/v1/embeddings", {"input": [14]}, 400, "token id 14; allowed: 0 to 13", "input"),
    ("/v1/embeddings", {"input": [[1], [-1]]}, 400, "input[1] has the token id -1", "input"),
    ("/v1/embeddings", {"input": [10**30]}, 400, "allowed: 0 to 13", "input"),
    ("/v1/embeddings", {"input": [1] * 33}, 400, "input[0] has 33 tokens", "input"),
    ("/v1/embeddings", {"input": "a", "dimensions": 17}, 400, "16", "dimensions"),
    ("/v1/embeddings", {"input": "a", "dimensions": 0}, 400, ">= 1", "dimensions"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, 400, "hex", "encoding_format"),
    ("/v1/nothing", {"input": "a"}, 404, "no such path", None),
]


@pytest.mark.parametrize(("path", "body", "status", "says", "param"), BAD)
async def test_bad_requests_name_the_field(engine, path, body, status, says, param):
    answer = await post(engine, path, body)
    error = answer.json()["error"]
    is_too_long = "tokens" in says
    assert answer.status_code == status
    assert error["code"] == ("context_length_exceeded" if is_too_long else status)
    assert says in error["message"]
    assert error["param"] == param


async def test_other_methods_are_refused(engine):
    async with client(engine) as http:
        assert (await http.get("/classify")).status_code == 405


async def test_invalid_unicode_fails_only_its_own_request(engine):
    calls = [engine.service.encode("classify", [text]) for text in ("good", "\ud800", "bad")]
    good, wrong, bad = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(wrong, InvalidRequestError)
    assert good.rows.shape == bad.rows.shape == (1, 3)


async def test_chunked_bodies_and_early_disconnects(engine):
    whole = json.dumps({"input": "good"}).encode()
    sent = []

    async def send(message):
        sent.append(message)

    def receiver(messages):
        waiting = iter(messages)

        async def receive():
            return next(waiting)

        return receive

    scope = {"type": "http", "method": "POST", "path": "/classify"}
    pieces = [
        {"type": "http.request", "body": whole[:5], "more_body": True},
        {"type": "http.request", "body": whole[5:]},
    ]
    await engine.app(scope, receiver(pieces), send)
    assert sent[0]["status"] == 200
    sent.clear()
    await engine.app(scope, receiver([pieces[0], {"type": "http.disconnect"}]), send)
    assert not sent
