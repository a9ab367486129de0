"""Queue, batches and threads of a classifier: fairness, limits, cancellation, shutdown."""

import asyncio
import threading
from queue import SimpleQueue

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ClassifierConfig
from cluster.engines.classifier.engine import ClassifierEngine
from cluster.engines.classifier.model.device import share_threads
from cluster.engines.classifier.serving.jobs import Job
from cluster.engines.classifier.serving.queue import JobQueue
from cluster.engines.classifier.serving.runner import MAX_STREAMS
from cluster.errors import OverloadedError, PayloadTooLargeError, UnavailableError
from tests.serve.classifier_kit import config, one_thread, post, serving, until  # noqa: F401
from tests.serve.word_bert import MAX_TOKENS, make_bert, save_model


@pytest.fixture
async def engine(word_model_path):
    async with serving(config(), word_model_path) as engine:
        yield engine


async def test_slow_tokenizing_does_not_delay_short_texts(engine):
    plain = engine.service.model.tokenizer.readers["right"]
    release, started = threading.Event(), []

    class Slow:
        max_tokens_per_text = plain.max_tokens_per_text

        def read(self, texts, first):
            started.append(texts)
            assert release.wait(30)
            return plain.read(texts, first)

    large = engine.service.encode("classify", ["film " * 20_000], reader=Slow())
    task = asyncio.create_task(large)
    await until(lambda: started)
    try:
        async with asyncio.timeout(60):
            assert (await engine.service.encode("classify", ["good"])).rows.shape == (1, 3)
        assert not task.done()
    finally:
        release.set()
    assert (await task).num_tokens == MAX_TOKENS


async def test_single_texts_overtake_a_large_request(engine, gate):
    release = gate(engine)
    large = asyncio.create_task(engine.service.encode("classify", ["good film"] * 4096))
    await until(lambda: engine.load().running)
    for _ in range(5):
        single = asyncio.create_task(engine.service.encode("classify", ["the plot was dull"]))
        await until(lambda: engine.load().waiting)
        while not single.done():
            computed = engine.counts().texts
            release.release()
            await until(lambda: engine.counts().texts > computed)  # noqa: B023
            await asyncio.sleep(0)
        assert not large.done()
    release.release(5000)
    assert (await large).rows.shape == (4096, 3)


async def test_texts_of_a_disconnected_client_are_skipped_and_counted(engine, gate):
    release = gate(engine)
    first = asyncio.create_task(engine.service.encode("classify", ["good"]))
    await until(lambda: engine.load().running)
    gone = asyncio.create_task(post(engine, "/classify", {"input": ["bad film"] * 100}))
    await until(lambda: engine.counts().queued_tokens == 400)
    assert engine.load().waiting == 1
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    await until(lambda: engine.counts().skipped_texts == 100)
    assert engine.counts().queued_tokens == 0
    release.release(10)
    await first
    assert engine.counts().texts == 1
    assert (await engine.service.encode("classify", ["good"])).rows.shape == (1, 3)


async def test_a_full_queue_rejects_at_once(word_model_path, gate):
    async with serving(config(max_queued_tokens=100), word_model_path) as engine:
        release = gate(engine)
        first = asyncio.create_task(engine.service.encode("classify", ["good"]))
        await until(lambda: engine.load().running)
        second = asyncio.create_task(engine.service.encode("classify", ["bad film"] * 20))
        await until(lambda: engine.counts().queued_tokens == 80)
        answer = await post(engine, "/classify", {"input": ["bad film"] * 20})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        with pytest.raises(OverloadedError, match="80 tokens are waiting"):
            await engine.service.encode("classify", ["a b c d e f g h i j k l m n o p q r s t"])
        release.release(10)
        await asyncio.gather(first, second)
        with pytest.raises(PayloadTooLargeError):
            await engine.service.encode("classify", ["a"] * 40)
        assert (await engine.service.encode("classify", ["a"])).num_tokens == 3
        assert engine.counts().queued_tokens == 0


async def test_a_cut_text_reserves_only_the_tokens_it_keeps(word_model_path, gate):
    async with serving(config(max_queued_tokens=200), word_model_path) as engine:
        release, tokenizer = gate(engine), engine.service.model.tokenizer
        first = asyncio.create_task(engine.service.encode("classify", ["good"]))
        await until(lambda: engine.load().running)
        second = asyncio.create_task(engine.service.encode("classify", ["bad film"]))
        await until(lambda: engine.counts().queued_tokens == 4)
        cutting = engine.service.encode("classify", ["good " * 10_000], tokenizer.readers["right"])
        third = asyncio.create_task(cutting)
        await until(
            lambda: third.done() or engine.counts().queued_tokens == 4 + tokenizer.max_tokens
        )
        release.release(10)
        assert (await third).num_tokens == tokenizer.max_tokens
        await asyncio.gather(first, second)


async def test_stop_fails_open_requests_and_refuses_new_ones(word_model_path, gate):
    engine = ClassifierEngine(config(), word_model_path)
    await engine.start()
    release = gate(engine)
    service = engine.service
    open_ones = [asyncio.create_task(service.encode("classify", ["good"])) for _ in range(3)]
    await until(lambda: engine.load().running)
    stopping = asyncio.create_task(engine.stop())
    answers = await asyncio.gather(*open_ones, return_exceptions=True)
    assert [type(answer) for answer in answers] == [UnavailableError] * 3
    release.release(10)
    await stopping
    await engine.stop()
    with pytest.raises(UnavailableError):
        await service.encode("classify", ["good"])
    assert (await post(engine, "/classify", {"input": "a"})).status_code == 503


def put_texts(queue, *lengths):
    job = Job("classify", [], None, asyncio.get_running_loop().create_future(), 0.0)
    job.ids = [np.zeros(length, np.int64) for length in lengths]
    queue.put_job(job)


async def test_waiting_texts_are_divided_among_threads_and_small_batches_wait():
    queue = JobQueue(max_batch_tokens=1024, max_queued_tokens=100_000)
    queue.set_streams(2)

    put_texts(queue, *[10] * 60)
    first, second = queue.take_batch(), queue.take_batch()
    assert [scheduled.batch.num_tokens for scheduled in (first, second)] == [300, 300]
    assert not first.uses_all_cores
    put_texts(queue, *[10] * 5)
    taken = []
    thread = threading.Thread(target=lambda: taken.append(queue.take_batch()))
    thread.start()
    queue.finish_batch()
    assert not taken  # 50 tokens wait while another batch runs
    queue.finish_batch()
    thread.join()
    assert taken[0].uses_all_cores
    assert taken[0].batch.num_tokens == 50
    queue.finish_batch()
    put_texts(queue, *[64] * 100)
    assert queue.take_batch().batch.num_tokens == 1024


async def test_a_gpu_prepares_only_full_batches_ahead():
    queue = JobQueue(max_batch_tokens=1024, max_queued_tokens=100_000)
    queue.set_streams(2, one_at_a_time=True)
    taken = SimpleQueue()
    thread = threading.Thread(target=lambda: taken.put(queue.take_batch(is_leader=False)))
    thread.start()

    put_texts(queue, *[10] * 60)
    assert queue.take_batch().batch.num_tokens == 600
    put_texts(queue, *[10] * 100)
    assert taken.empty()
    put_texts(queue, *[10] * 10)
    scheduled = await asyncio.to_thread(taken.get, timeout=30)
    assert scheduled.batch.num_tokens == 1020
    thread.join()


async def test_leftover_texts_wake_another_thread():
    queue = JobQueue(max_batch_tokens=1024, max_queued_tokens=100_000)
    queue.set_streams(3)
    taken = SimpleQueue()
    threads = [
        threading.Thread(target=lambda leads=leads: taken.put(queue.take_batch(leads)))
        for leads in (True, False, False)
    ]
    for thread in threads:
        thread.start()
    put_texts(queue, *[10] * 90)
    batches = [await asyncio.to_thread(taken.get, timeout=30) for _ in threads]
    assert sorted(scheduled.batch.num_tokens for scheduled in batches) == [300, 300, 300]
    assert not any(scheduled.uses_all_cores for scheduled in batches)


@given(num_threads=st.integers(1, 300), num_streams=st.integers(1, MAX_STREAMS))
def test_all_threads_are_shared_out_evenly(num_threads, num_streams):
    shares = share_threads(num_threads, min(num_threads, num_streams))
    assert sum(shares) == num_threads
    assert min(shares) >= 1
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("threads", [3, 6])
async def test_concurrent_threads_answer_every_request_once(tmp_path, monkeypatch, threads):
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    path = save_model(tmp_path / "model", make_bert())
    config = ClassifierConfig(name="a", model="a", dtype="float32", threads=threads)
    async with serving(config, path) as engine:
        service = engine.service
        lists = [[f"good {'film ' * (i % 20)}"] * (1 + i % 40) for i in range(60)]
        answers = await asyncio.gather(*(service.encode("classify", texts) for texts in lists))
        alone = await service.encode("classify", [one[0] for one in lists])
        counts = engine.counts()
    for answer, rows, row in zip(answers, lists, alone.rows, strict=True):
        assert len(answer.rows) == len(rows)
        np.testing.assert_allclose(answer.rows, np.tile(row, (len(rows), 1)), atol=1e-5)
    assert counts.texts == sum(map(len, lists)) + len(lists)
    assert 0 <= counts.padding < 0.5 * counts.tokens
