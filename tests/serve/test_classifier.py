import asyncio
import base64
import json
import shutil
import threading

import httpx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from cluster.config import ClassifierConfig
from cluster.engines.classifier import make_classifier_engine
from cluster.engines.classifier.engine import ClassifierEngine
from cluster.engines.classifier.model import build, device
from cluster.engines.classifier.model.agreement import Agreement
from cluster.engines.classifier.model.check_texts import FILE
from cluster.engines.classifier.model.packed.cpu import PackedBert
from cluster.engines.classifier.model.packed.network import supports
from cluster.engines.classifier.model.padded import TransformersModel
from cluster.engines.classifier.serving.tasks.embed import Embed
from cluster.errors import (
    ConfigError,
    EngineDeadError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    PayloadTooLargeError,
    UnavailableError,
)
from tests.serve.classifier_kit import (  # noqa: F401, the fixture is used by all tests here
    one_thread,
    until,
)

WORDS = ["good", "bad", "film", "the", "a", "plot", "dull", "fine", "was", "not"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
MAX_TOKENS = 32
SIZES = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.5,
}
LABELS = {"id2label": {0: "negative", 1: "neutral", 2: "positive"}}
LABELS["label2id"] = {label: i for i, label in LABELS["id2label"].items()}


def make_tokenizer():
    vocab = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=MAX_TOKENS,
    )


def save_model(path, network):
    network.eval().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def bert(**changes):
    torch.manual_seed(1)
    config = BertConfig(**SIZES, max_position_embeddings=40, pad_token_id=0, **LABELS, **changes)
    return BertForSequenceClassification(config)


@pytest.fixture(scope="module")
def network():
    return bert().eval()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory, network):
    return save_model(tmp_path_factory.mktemp("bert"), network)


def config(**changes):
    fields = {"name": "tiny", "model": "tiny", "dtype": "float32", "threads": 1}
    return ClassifierConfig(**{**fields, "max_batch_tokens": 64, **changes})


@pytest.fixture
async def engine(model_path):
    async with running(config(), model_path) as engine:
        yield engine


class running:  # noqa: N801
    def __init__(self, config, path):
        self.engine = ClassifierEngine(config, path)

    async def __aenter__(self):
        await self.engine.start()
        return self.engine

    async def __aexit__(self, *_):
        await self.engine.stop()


def client(engine):
    transport = httpx.ASGITransport(app=engine.app)
    return httpx.AsyncClient(transport=transport, base_url="http://tandem")


async def post(engine, path, body):
    async with client(engine) as http:
        if isinstance(body, bytes):
            return await http.post(path, content=body)
        return await http.post(path, json=body)


def expected(network, texts):
    """Scores and mean-pooled unit vectors from transformers itself, one text at a time."""
    tokenizer = make_tokenizer()
    scores, vectors = [], []
    with torch.inference_mode():
        for text in texts:
            inputs = tokenizer(text, return_tensors="pt", truncation=True)
            inputs.pop("token_type_ids", None)
            scores.append(network(**inputs).logits.softmax(-1)[0])
            hidden = network.base_model(**inputs).last_hidden_state[0]
            vectors.append(torch.nn.functional.normalize(hidden.mean(0), dim=0))
    return torch.stack(scores).numpy(), torch.stack(vectors).numpy()


TEXTS = ["good film", "", "the plot was dull", "unknown words", "a " * 20, "good\x00\x07 film", "é"]


async def test_classify_gives_the_scores_of_transformers(engine, network):
    answer = (await post(engine, "/classify", {"model": "tiny", "input": TEXTS})).json()
    scores, _ = expected(network, TEXTS)
    assert (answer["object"], answer["model"]) == ("list", "tiny")
    names = list(LABELS["id2label"].values())
    for index, item in enumerate(answer["data"]):
        assert item["index"] == index
        found = [pair["score"] for pair in item["scores"]]
        assert found == sorted(found, reverse=True)
        by_label = {pair["label"]: pair["score"] for pair in item["scores"]}
        assert [by_label[name] for name in names] == pytest.approx(scores[index], abs=1e-5)
        assert (item["label"], item["score"]) == (item["scores"][0]["label"], found[0])
    lengths = [len(ids) for ids in make_tokenizer()(TEXTS)["input_ids"]]
    assert answer["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}


async def test_top_k_limits_the_scores(engine):
    for top_k, count in ((1, 1), (2, 2), (9, 3), (None, 3)):
        answer = (await post(engine, "/classify", {"input": "good", "top_k": top_k})).json()
        assert len(answer["data"][0]["scores"]) == count


async def test_embeddings_are_the_unit_vectors_of_the_mean(engine, network):
    answer = (await post(engine, "/v1/embeddings", {"input": TEXTS})).json()
    _, vectors = expected(network, TEXTS)
    found = np.array([item["embedding"] for item in answer["data"]])
    assert [item["index"] for item in answer["data"]] == list(range(len(TEXTS)))
    np.testing.assert_allclose(found, vectors, atol=1e-5)


async def test_embeddings_formats_agree(engine):
    body = {"input": "good film", "user": "someone"}
    plain = (await post(engine, "/v1/embeddings", body)).json()["data"][0]["embedding"]
    coded = await post(engine, "/v1/embeddings", {**body, "encoding_format": "base64"})
    decoded = np.frombuffer(base64.b64decode(coded.json()["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(decoded, plain, atol=1e-6)
    short = await post(engine, "/v1/embeddings", {**body, "dimensions": 4})
    vector = np.array(short.json()["data"][0]["embedding"])
    np.testing.assert_allclose(vector, np.array(plain[:4]) / np.linalg.norm(plain[:4]), atol=1e-6)


@pytest.mark.parametrize(("texts", "aside"), [(2, False), (4096, True)])
async def test_large_replies_are_written_beside_the_event_loop(engine, monkeypatch, texts, aside):
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


async def test_token_ids_are_as_good_as_texts(engine):
    texts = ["good film", "the plot was dull"]
    ids = make_tokenizer()(texts)["input_ids"]
    by_text = (await post(engine, "/v1/embeddings", {"input": texts})).json()
    by_ids = (await post(engine, "/v1/embeddings", {"input": ids})).json()
    one = (await post(engine, "/v1/embeddings", {"input": ids[0]})).json()
    assert by_ids["usage"] == by_text["usage"]
    for left, right in zip(by_ids["data"], by_text["data"], strict=True):
        assert left["embedding"] == pytest.approx(right["embedding"], abs=1e-5)
    assert one["data"][0]["embedding"] == pytest.approx(by_text["data"][0]["embedding"], abs=1e-5)


async def test_each_reply_carries_its_times(engine):
    headers = (await post(engine, "/classify", {"input": "good"})).headers
    for part in ("tokenize", "queue", "compute"):
        assert float(headers[f"x-tandem-{part}-ms"]) >= 0


LONG = "film " * (MAX_TOKENS - 1)
BAD = [
    ("/classify", b"", 400, "JSON", None),
    ("/classify", b'{"input": ', 400, "JSON", None),
    ("/classify", b'{"input": "\xff"}', 400, "UTF-8", None),
    ("/classify", b'{"input": "\\ud800"}', 400, "JSON", None),
    ("/classify", b'{"input": "\\udc00 x"}', 400, "surrogate", None),
    ("/classify", b'{"input": "\xed\xa0\x80"}', 400, "UTF-8", None),
    ("/classify", b"[" * 100_000, 422, "object", None),
    ("/classify", b'{"input": ' + b"[" * 100_000, 422, "input", "input[0][0]"),
    ("/classify", {"input": []}, 400, "input is empty", "input"),
    ("/classify", {}, 422, "`input`", "input"),
    ("/classify", {"input": 3}, 422, "input: expected", "input"),
    ("/classify", {"input": ["a", None]}, 422, "input[1]", "input[1]"),
    ("/classify", {"input": "a", "top_k": 0}, 422, ">= 1", "top_k"),
    ("/classify", {"input": "a", "top_k": True}, 422, "top_k", "top_k"),
    ("/classify", {"input": "a", "inputs": "b"}, 422, "`inputs`", "inputs"),
    ("/classify", {"input": "a", "truncate": "yes"}, 422, "truncate", "truncate"),
    ("/classify", {"input": "a", "model": "other"}, 404, "'tiny'", "model"),
    ("/classify", {"input": ["a"] * 10_001}, 400, "10000", "input"),
    ("/classify", {"input": LONG}, 400, "input[0] has 33 tokens; the model takes 32", "input"),
    ("/classify", {"input": ["a", "film " * 50]}, 400, "input[1] has 52 tokens", "input"),
    ("/classify", {"input": "a" + " a" * 50_000}, 400, "50003 tokens", "input"),
    ("/v1/embeddings", {"input": []}, 400, "input is empty", "input"),
    ("/v1/embeddings", {"input": [[]]}, 400, "input[0] is empty", "input"),
    ("/v1/embeddings", {"input": [1, "a"]}, 422, "mixture", "input"),
    ("/v1/embeddings", {"input": [[1], 2]}, 422, "mixture", "input"),
    ("/v1/embeddings", {"input": [14]}, 400, "token id 14; allowed: 0 to 13", "input"),
    ("/v1/embeddings", {"input": [[1], [-1]]}, 400, "input[1] has the token id -1", "input"),
    ("/v1/embeddings", {"input": [10**30]}, 400, "allowed: 0 to 13", "input"),
    ("/v1/embeddings", {"input": [1] * 33}, 400, "input[0] has 33 tokens", "input"),
    ("/v1/embeddings", {"input": "a", "dimensions": 17}, 400, "16", "dimensions"),
    ("/v1/embeddings", {"input": "a", "dimensions": 0}, 422, ">= 1", "dimensions"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, 422, "hex", "encoding_format"),
    ("/v1/nothing", {"input": "a"}, 404, "no such path", None),
]


@pytest.mark.parametrize(("path", "body", "status", "says", "param"), BAD)
async def test_bad_requests_are_refused_by_name(engine, path, body, status, says, param):
    answer = await post(engine, path, body)
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == status
    assert says in error["message"]
    assert error["param"] == param


async def test_other_methods_are_refused(engine):
    async with client(engine) as http:
        assert (await http.get("/classify")).status_code == 405


@pytest.mark.parametrize(
    "text", [LONG, "film " * 20_000, "\x00" * 50, "", "\u200b\ufffe\U0001f600"]
)
async def test_odd_texts_have_an_answer(engine, text):
    answer = await post(engine, "/classify", {"input": text, "truncate": True})
    assert answer.status_code == 200
    assert 2 <= answer.json()["usage"]["total_tokens"] <= MAX_TOKENS


async def test_a_cut_text_is_the_one_that_transformers_cuts(engine, network):
    text = " ".join(WORDS * 5)
    answer = (await post(engine, "/v1/embeddings", {"input": text, "truncate": True})).json()
    _, vectors = expected(network, [text])
    assert answer["data"][0]["embedding"] == pytest.approx(vectors[0], abs=1e-5)


@given(texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join), max_size=30))
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_scores_do_not_depend_on_the_company(model_path, network, texts):
    async def compare():
        async with running(config(), model_path) as engine:
            one = (await engine.service.encode("classify", ["good film", *texts])).rows[0]
            await_all = [engine.service.encode("classify", [text]) for text in texts]
            rows = [encoded.rows[0] for encoded in await asyncio.gather(*await_all)]
            return one, rows

    one, rows = asyncio.run(compare())
    scores, _ = expected(network, ["good film", *texts])
    np.testing.assert_allclose([one, *rows], scores, atol=1e-5)


async def test_a_text_that_takes_long_to_read_holds_nobody_up(engine):
    plain, release, begun = engine.service.model.tokenizer.reader(True), threading.Event(), []

    class Slow:
        max_tokens_per_text = plain.max_tokens_per_text

        def read(self, texts, first):
            begun.append(texts)
            assert release.wait(30)
            return plain.read(texts, first)

    large = engine.service.encode("classify", ["film " * 20_000], reader=Slow())
    task = asyncio.create_task(large)
    await until(lambda: begun)
    try:
        async with asyncio.timeout(20):
            assert (await engine.service.encode("classify", ["good"])).rows.shape == (1, 3)
        assert not task.done()
    finally:
        release.set()
    assert (await task).num_tokens == MAX_TOKENS


async def test_ten_thousand_texts_are_answered_in_order(engine, network):
    texts = [" ".join(WORDS[i % 10 : i % 10 + i % 7]) for i in range(10_000)]
    answer = await post(engine, "/classify", {"input": texts, "top_k": 1})
    assert answer.status_code == 200
    data = answer.json()["data"]
    scores, _ = expected(network, texts[:70])
    assert [item["index"] for item in data] == list(range(10_000))
    wanted = np.resize(scores.max(1), 10_000)
    np.testing.assert_allclose([item["score"] for item in data], wanted, atol=1e-5)


async def test_many_requests_at_once_get_their_own_answers(engine, network):
    texts = [" ".join(WORDS[i % 10 : i % 10 + i % 7]) for i in range(100)]
    scores, vectors = expected(network, texts)
    classify = [engine.service.encode("classify", [text]) for text in texts]
    embed = [engine.service.encode("embed", [text, "a"]) for text in texts]
    answers = await asyncio.gather(*classify, *embed)
    np.testing.assert_allclose([a.rows[0] for a in answers[:100]], scores, atol=1e-5)
    np.testing.assert_allclose([a.rows[0] for a in answers[100:]], vectors, atol=1e-5)
    assert engine.counts().texts == 300
    assert engine.counts().batches < 150
    assert engine.load().running == engine.load().waiting == 0


async def test_single_texts_do_not_wait_for_a_large_request(engine):
    large = asyncio.create_task(engine.service.encode("classify", ["good film"] * 4096))
    await until(lambda: engine.load().running)
    for _ in range(5):
        await engine.service.encode("classify", ["the plot was dull"])
        assert not large.done()
    assert (await large).rows.shape == (4096, 3)


async def test_a_client_that_leaves_is_skipped_and_counted(engine, gate):
    release = gate(engine)
    first = asyncio.create_task(engine.service.encode("classify", ["good"]))
    await until(lambda: engine.load().running)
    gone = asyncio.create_task(post(engine, "/classify", {"input": ["bad film"] * 100}))
    await until(lambda: engine.service._queue.queued_tokens == 400)
    assert engine.load().waiting == 1
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    await until(lambda: engine.counts().skipped_texts == 100)
    assert engine.service._queue.queued_tokens == 0
    release.release(10)
    await first
    assert engine.counts().texts == 1
    assert (await engine.service.encode("classify", ["good"])).rows.shape == (1, 3)


async def test_a_full_queue_refuses_at_once(model_path, gate):
    async with running(config(max_queued_tokens=100), model_path) as engine:
        release = gate(engine)
        first = asyncio.create_task(engine.service.encode("classify", ["good"]))
        await until(lambda: engine.load().running)
        second = asyncio.create_task(engine.service.encode("classify", ["bad film"] * 20))
        await until(lambda: engine.service._queue.queued_tokens == 80)
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
        assert engine.service._queue.queued_tokens == 0


async def test_a_text_that_is_cut_waits_for_room_for_what_is_left_of_it(model_path, gate):
    async with running(config(max_queued_tokens=200), model_path) as engine:
        release, most = gate(engine), engine.service.model.tokenizer.max_tokens
        first = asyncio.create_task(engine.service.encode("classify", ["good"]))
        await until(lambda: engine.load().running)
        second = asyncio.create_task(engine.service.encode("classify", ["bad film"]))
        await until(lambda: engine.service._queue.queued_tokens == 4)
        long = "good " * 10_000
        third = asyncio.create_task(engine.service.encode("classify", [long], truncate=True))
        await until(lambda: third.done() or engine.service._queue.queued_tokens == 4 + most)
        release.release(10)
        assert (await third).num_tokens == most
        await asyncio.gather(first, second)


async def test_stop_ends_what_is_open_and_refuses_more(model_path, gate):
    engine = ClassifierEngine(config(), model_path)
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


async def test_a_failing_model_kills_the_engine_and_no_request_hangs(engine):
    def fail(task, ids):
        raise RuntimeError("secret details")

    await engine.check_health()
    engine.service.model.model.run = fail
    requests = [post(engine, "/classify", {"input": "good"}) for _ in range(3)]
    for answer in await asyncio.gather(*requests):
        assert answer.status_code in (500, 503)
        assert "secret" not in answer.text
    with pytest.raises(EngineDeadError):
        await engine.check_health()
    with pytest.raises(EngineDeadError):
        await engine.service.encode("classify", ["good"])


async def test_a_request_in_the_failing_batch_gets_an_internal_error(engine):
    def fail(task, ids):
        raise RuntimeError("secret details")

    engine.service.model.model.run = fail
    with pytest.raises(InternalError):
        await engine.service.encode("classify", ["good"])


async def test_a_text_that_is_no_unicode_fails_alone(engine):
    calls = [engine.service.encode("classify", [text]) for text in ("good", "\ud800", "bad")]
    good, wrong, bad = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(wrong, InvalidRequestError)
    assert good.rows.shape == bad.rows.shape == (1, 3)


@pytest.mark.parametrize(
    ("problem_type", "activation"),
    [
        ("single_label_classification", lambda x: x.softmax(-1)),
        ("multi_label_classification", torch.sigmoid),
        ("regression", lambda x: x),
    ],
)
async def test_scores_follow_the_problem_type(tmp_path, problem_type, activation):
    network = bert(problem_type=problem_type)
    path = save_model(tmp_path, network)
    inputs = make_tokenizer()("good film", return_tensors="pt")
    with torch.inference_mode():
        wanted = activation(network(inputs["input_ids"]).logits)
    async with running(config(), path) as engine:
        encoded = await engine.service.encode("classify", ["good film"])
    np.testing.assert_allclose(encoded.rows, wanted.numpy(), atol=1e-5)


def distilbert():
    sizes = {"vocab_size": 14, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    return DistilBertForSequenceClassification(
        DistilBertConfig(**sizes, max_position_embeddings=40, initializer_range=0.5, **LABELS)
    )


def roberta():
    return RobertaForSequenceClassification(
        RobertaConfig(**SIZES, max_position_embeddings=31, pad_token_id=0, **LABELS)
    )


@pytest.mark.parametrize(("make", "limit"), [(distilbert, MAX_TOKENS), (roberta, 30)])
async def test_other_architectures(tmp_path, make, limit):
    torch.manual_seed(2)
    network = make().eval()
    path = save_model(tmp_path, network)
    texts = [text for text in TEXTS if len(text) < 40]
    scores, vectors = expected(network, texts)
    async with running(config(), path) as engine:
        assert engine.service.model.tokenizer.max_tokens == limit
        classified = await engine.service.encode("classify", texts)
        embedded = await engine.service.encode("embed", texts)
        longest = await engine.service.encode("classify", ["film " * 50], truncate=True)
    np.testing.assert_allclose(classified.rows, scores, atol=1e-5)
    np.testing.assert_allclose(embedded.rows, vectors, atol=1e-5)
    assert longest.num_tokens == limit


RAGGED = st.lists(st.integers(1, 40), min_size=1, max_size=20).map(sorted)


@given(lengths=RAGGED, seed=st.integers(0, 99), task=st.sampled_from(["classify", "embed"]))
@settings(max_examples=50, deadline=None)
def test_packed_and_padded_agree(network, lengths, seed, task):
    random = np.random.default_rng(seed)
    ids = [random.integers(0, SIZES["vocab_size"], length) for length in lengths]
    packed = PackedBert(network).run(task, ids)
    padded = TransformersModel(network, pad_id=0).run(task, ids)
    np.testing.assert_allclose(packed, padded, atol=1e-5)


def test_only_plain_bert_is_packed(network):
    assert supports(network)
    assert supports(network.base_model)
    assert not supports(roberta())
    assert not supports(distilbert())


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))


def with_check_texts(path, network, texts):
    found = save_model(path, network)
    (path / FILE).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
async def test_low_precision_is_near_and_says_how_near(own_home, tmp_path, network, dtype):
    path = with_check_texts(tmp_path / "model", network, TEXTS)
    async with running(config(dtype=dtype), path) as engine:
        encoded = await engine.service.encode("classify", TEXTS)
        assert engine.counts().agreement == 1
    np.testing.assert_allclose(encoded.rows, expected(network, TEXTS)[0], atol=0.1)


async def test_low_precision_that_disagrees_is_refused_or_not_chosen(
    own_home, tmp_path, network, monkeypatch
):
    path = with_check_texts(tmp_path / "model", network, TEXTS)
    monkeypatch.setattr(build, "measure_agreement", lambda *_: Agreement(0.9, len(TEXTS)))
    monkeypatch.setattr(device, "has_native_bfloat16", lambda: True)
    with pytest.raises(ConfigError, match=r"bfloat16 agrees with float32 on 90\.00% of 7 answers"):
        await ClassifierEngine(config(dtype="bfloat16"), path).start()
    async with running(config(dtype="auto"), path) as engine:
        encoded = await engine.service.encode("classify", TEXTS)
        assert engine.counts().agreement is None
    np.testing.assert_allclose(encoded.rows, expected(network, TEXTS)[0], atol=1e-5)


async def test_int8_is_for_bert_alone(own_home, tmp_path):
    path = save_model(tmp_path / "model", distilbert())
    with pytest.raises(ConfigError, match="int8 is for BERT"):
        await ClassifierEngine(config(dtype="int8"), path).start()


async def test_an_encoder_alone_embeds_and_does_not_classify(tmp_path, network):
    path = save_model(tmp_path, BertModel(network.config))
    engine = make_classifier_engine(config(tasks=("embed",)), resolve=lambda _: path)
    assert engine.routes() == ("/v1/embeddings",)
    await engine.start()
    assert (await post(engine, "/v1/embeddings", {"input": "good"})).status_code == 200
    assert (await post(engine, "/classify", {"input": "good"})).status_code == 404
    await engine.stop()
    with pytest.raises(ConfigError, match="SequenceClassification"):
        await ClassifierEngine(config(), path).start()


async def test_a_tokenizer_with_tokens_of_its_own_is_a_config_error(tmp_path, network):
    path = save_model(tmp_path, network)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<user>"])
    tokenizer.save_pretrained(path)
    with pytest.raises(ConfigError, match="tokens up to 14, the model up to 13"):
        await ClassifierEngine(config(), path).start()


async def test_a_missing_model_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot load"):
        await ClassifierEngine(config(), str(tmp_path / "none")).start()


async def test_weights_that_are_no_safetensors_are_refused(tmp_path, network, model_path):
    shutil.copytree(model_path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"cannot load.*safetensors"):
        await ClassifierEngine(config(), str(tmp_path)).start()


async def test_bodies_may_come_in_pieces_and_clients_may_leave_early(engine):
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


POISON = 20
"""The tokens of a text that the first layer cannot compute."""


def poison_packed(model):
    """Let the first layer of a packed model fail on texts of ``POISON`` tokens."""
    layers = model._network._layers
    plain = layers[0]

    def layer(attention, hidden):
        if any(group.length >= POISON for group in attention.layout.groups):
            raise RuntimeError("secret details")
        return plain(attention, hidden)

    layers[0] = layer


def poison_transformers(model):
    """The same for a model of transformers."""

    def refuse(_layer, args):
        if args[0].shape[1] >= POISON:
            raise RuntimeError("secret details")

    model._encoder.transformer.layer[0].register_forward_pre_hook(refuse)


LONG_TEXT = "film " * (POISON - 2)
SHORT = [text for text in TEXTS if len(text) < POISON]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("make", "poison"), [(bert, poison_packed), (distilbert, poison_transformers)]
)
async def test_a_batch_that_fails_takes_its_own_requests_alone(
    tmp_path, caplog, make, poison, threads
):
    async with running(config(threads=threads), save_model(tmp_path, make())) as engine:
        before = (await engine.service.encode("classify", ["good"])).rows
        poison(engine.service.model.model)
        answer = await post(engine, "/classify", {"input": LONG_TEXT})
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "InternalServerError"
        assert "secret" not in answer.text
        await engine.check_health()
        # Its other texts are skipped, in whichever batch they are or would have been.
        with pytest.raises(InternalError):
            await engine.service.encode("classify", ["good", LONG_TEXT] * 100)
        after = (await engine.service.encode("classify", ["good"])).rows
        await engine.check_health()
        assert engine.counts().failed_batches >= 2
        assert engine.service._queue.queued_tokens == 0
        assert engine.load().running == engine.load().waiting == 0
    np.testing.assert_allclose(after, before, atol=1e-5)
    failures = [record for record in caplog.records if record.exc_info]
    assert len(failures) == engine.counts().failed_batches
    assert all("secret details" in str(record.exc_info[1]) for record in failures)


async def test_requests_beside_a_batch_that_fails_are_answered(engine, gate, network):
    poison_packed(engine.service.model.model)
    release = gate(engine)
    first = asyncio.create_task(engine.service.encode("classify", ["good"]))
    await until(lambda: engine.load().running)
    failing = asyncio.create_task(engine.service.encode("classify", [LONG_TEXT]))
    # Of another task, and so never in the same batch.
    others = [asyncio.create_task(engine.service.encode("embed", [text])) for text in SHORT]
    await until(lambda: engine.load().waiting == 1 + len(SHORT))
    release.release(1000)
    with pytest.raises(InternalError):
        await failing
    assert (await first).rows.shape == (1, 3)
    found = [encoded.rows[0] for encoded in await asyncio.gather(*others)]
    np.testing.assert_allclose(found, expected(network, SHORT)[1], atol=1e-5)


async def test_a_model_that_cannot_even_run_special_tokens_is_dead(engine, gate):
    def fail(attention, hidden):
        raise RuntimeError("secret details")

    engine.service.model.model._network._layers[0] = fail
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
