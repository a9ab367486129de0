"""Failing batches and dead models."""

import asyncio
import itertools
import threading

import numpy as np
import pytest

from cluster.engines.classifier.model.packed.cpu import PackedBert
from cluster.engines.classifier.model.padded import TransformersModel
from cluster.errors import EngineDeadError, InternalError
from tests import asgi
from tests.serve.classifier_kit import config, one_thread, post, serving, until  # noqa: F401
from tests.serve.word_bert import TEXTS, expected, make_bert, make_distilbert, save_model


@pytest.fixture
async def engine(word_model_path):
    async with serving(config(), word_model_path) as engine:
        yield engine


async def test_a_failing_model_kills_the_engine_and_ends_all_requests(engine):
    def fail(task, ids):
        raise RuntimeError("secret details")

    await engine.check_health()
    engine.service.model.model.run = fail
    requests = [post(engine, "/classify", {"input": "good"}) for _ in range(3)]
    for answer in await asyncio.gather(*requests):
        assert answer.status_code in (500, 503)
        assert "secret" not in answer.text
    await until(lambda: not is_healthy(engine))  # requests of the failing batch may end earlier
    with pytest.raises(EngineDeadError):
        await engine.service.encode("classify", ["good"])


def is_healthy(engine):
    try:
        engine.service.check_health()
    except EngineDeadError:
        return False
    return True


async def test_a_request_in_the_failing_batch_gets_an_internal_error(engine):
    def fail(task, ids):
        raise RuntimeError("secret details")

    engine.service.model.model.run = fail
    with pytest.raises(InternalError):
        await engine.service.encode("classify", ["good"])


POISON = 20
"""Tokens from which a text makes its batch fail."""
LONG_TEXT = "film " * (POISON - 2)
SHORT = [text for text in TEXTS if len(text) < POISON]


def poison(monkeypatch, model_class):
    """Make models of a class fail on batches with a text of ``POISON`` tokens."""
    plain = model_class.run

    def run(model, task, ids):
        if max(map(len, ids)) >= POISON:
            raise RuntimeError("secret details")
        return plain(model, task, ids)

    monkeypatch.setattr(model_class, "run", run)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("make", "model_class"), [(make_bert, PackedBert), (make_distilbert, TransformersModel)]
)
async def test_a_failing_batch_fails_only_its_own_requests(
    tmp_path, caplog, monkeypatch, make, model_class, threads
):
    async with serving(config(threads=threads), save_model(tmp_path, make())) as engine:
        before = (await engine.service.encode("classify", ["good"])).rows
        poison(monkeypatch, model_class)
        answer = await post(engine, "/classify", {"input": LONG_TEXT})
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "InternalServerError"
        assert "secret" not in answer.text
        await engine.check_health()
        # Its other texts are skipped in every batch.
        with pytest.raises(InternalError):
            await engine.service.encode("classify", ["good", LONG_TEXT] * 100)
        after = (await engine.service.encode("classify", ["good"])).rows
        await engine.check_health()
        assert engine.counts().failed_batches >= 2
        assert engine.counts().queued_tokens == 0
        assert engine.load().running == engine.load().waiting == 0
    np.testing.assert_allclose(after, before, atol=1e-5)
    failures = [record for record in caplog.records if record.exc_info]
    assert len(failures) == engine.counts().failed_batches
    assert all("secret details" in str(record.exc_info[1]) for record in failures)


async def test_requests_of_other_batches_are_answered(engine, gate, monkeypatch, word_network):
    poison(monkeypatch, PackedBert)
    release = gate(engine)
    first = asyncio.create_task(engine.service.encode("classify", ["good"]))
    await until(lambda: engine.load().running)
    failing = asyncio.create_task(engine.service.encode("classify", [LONG_TEXT]))
    # Batches have a single task, so these are in other batches.
    others = [asyncio.create_task(engine.service.encode("embed", [text])) for text in SHORT]
    await until(lambda: engine.load().waiting == 1 + len(SHORT))
    release.release(1000)
    with pytest.raises(InternalError):
        await failing
    assert (await first).rows.shape == (1, 3)
    found = [encoded.rows[0] for encoded in await asyncio.gather(*others)]
    np.testing.assert_allclose(found, expected(word_network, SHORT)[1], atol=1e-5)


async def test_an_engine_is_dead_if_the_shortest_text_fails(engine, gate, monkeypatch):
    def fail(model, task, ids):
        raise RuntimeError("secret details")

    monkeypatch.setattr(PackedBert, "run", fail)
    release = gate(engine)
    service = engine.service
    first = asyncio.create_task(service.encode("classify", ["good"]))
    await until(lambda: engine.load().running)
    others = [asyncio.create_task(post(engine, "/classify", {"input": "bad"})) for _ in range(3)]
    await until(lambda: engine.load().waiting == 3)
    release.release(1000)
    with pytest.raises(InternalError):
        await first
    assert [(await answer).status_code for answer in others] == [503] * 3
    with pytest.raises(EngineDeadError):
        await engine.check_health()
    with pytest.raises(EngineDeadError):
        await service.encode("classify", ["good"])


async def test_a_hung_batch_makes_the_engine_unhealthy(word_model_path, gate):
    async with serving(config(stall_timeout_s=0.3), word_model_path) as engine:
        release = gate(engine)
        hung = asyncio.create_task(post(engine, "/classify", {"input": "good"}))
        with pytest.raises(EngineDeadError, match="model"):
            await asgi.check_health_repeatedly(engine)
        answer = await hung
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
        with pytest.raises(EngineDeadError):
            await engine.service.encode("classify", ["good"])
        release.release(1000)


async def test_a_hung_probe_makes_the_engine_unhealthy(word_model_path, monkeypatch):
    released = threading.Event()
    async with serving(config(stall_timeout_s=0.3), word_model_path) as engine:
        num_runs = itertools.count()

        def fail_then_hang(model, task, ids):
            if next(num_runs) > 0:
                released.wait(200)  # longer than the check below
            raise RuntimeError("device lost")

        monkeypatch.setattr(PackedBert, "run", fail_then_hang)
        with pytest.raises(InternalError):
            await engine.service.encode("classify", ["good"])
        try:
            with pytest.raises(EngineDeadError, match="no progress"):
                await asgi.check_health_repeatedly(engine)
        finally:
            released.set()


async def test_a_hung_tokenizer_makes_the_engine_unhealthy(word_model_path, monkeypatch):
    released = threading.Event()
    async with serving(config(stall_timeout_s=0.3), word_model_path) as engine:
        reader = engine.service.model.tokenizer.readers[None]
        read = reader.read

        def hang(*args):
            released.wait(200)
            return read(*args)

        monkeypatch.setattr(type(reader), "read", lambda _reader, *args: hang(*args))
        hung = asyncio.create_task(post(engine, "/classify", {"input": "good"}))
        with pytest.raises(EngineDeadError, match="tokenizer"):
            await asgi.check_health_repeatedly(engine)
        assert (await hung).status_code == 503
        released.set()
