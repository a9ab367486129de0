"""Cross-encoders: scores and rankings, against transformers."""

import pytest

from cluster.client import wire
from cluster.config import ClassifierConfig
from cluster.engines.classifier.engine import ClassifierEngine
from cluster.errors import ConfigError
from tests.serve.classifier_kit import (  # noqa: F401
    ask,
    one_thread,
    post,
    refused,
    running,
    save,
)

QUERY = "how many people live in Berlin?"
DOCUMENTS = [
    "about three and a half million",
    "",
    "Anna Berger lives in Berlin and works for Siemens",
    "a wonderful picture",
    "a wonderful film",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("cross"), labels={0: "relevance"})


@pytest.fixture
async def engine(saved):
    async with running(saved, "score", "rerank") as engine:
        yield engine


def relevance(saved, query, documents):
    return [saved.logits(query, document).sigmoid().item() for document in documents]


async def test_scores_of_one_to_one_one_to_many_and_two_lists(engine, saved):
    wanted = relevance(saved, QUERY, DOCUMENTS)
    many = await ask(engine, "/score", {"text_1": QUERY, "text_2": DOCUMENTS})
    assert [item["score"] for item in many["data"]] == pytest.approx(wanted, abs=1e-5)
    assert [item["index"] for item in many["data"]] == list(range(5))
    assert wire.scores(many) == [item["score"] for item in many["data"]]
    assert {item["object"] for item in many["data"]} == {"score"}
    assert many["usage"]["total_tokens"] == many["usage"]["prompt_tokens"] > 5 * 12
    one = await ask(engine, "/v1/score", {"queries": QUERY, "documents": DOCUMENTS[0]})
    assert one["data"][0]["score"] == pytest.approx(wanted[0], abs=1e-5)
    pairs = await ask(engine, "/score", {"text_1": ["good", QUERY], "text_2": DOCUMENTS[:2]})
    scores = [*relevance(saved, "good", DOCUMENTS[:1]), wanted[1]]
    assert [item["score"] for item in pairs["data"]] == pytest.approx(scores, abs=1e-5)


async def test_documents_are_ranked(engine, saved):
    wanted = relevance(saved, QUERY, DOCUMENTS)
    order = sorted(range(5), key=lambda index: -wanted[index])
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        answer = await ask(engine, path, {"query": QUERY, "documents": DOCUMENTS})
        assert [item["index"] for item in answer["results"]] == order
        scores = [item["relevance_score"] for item in answer["results"]]
        assert scores == pytest.approx([wanted[index] for index in order], abs=1e-5)
        assert [ranked.index for ranked in wire.rankings(answer)] == order
        assert "document" not in answer["results"][0]
        assert answer["usage"]["total_tokens"] == answer["meta"]["tokens"]["input_tokens"]
        assert answer["meta"]["api_version"] == {"version": "2"}


async def test_the_best_documents_come_with_their_texts(engine, saved):
    body = {
        "model": "tiny",
        "query": QUERY,
        "documents": [{"text": text, "title": "ignored"} for text in DOCUMENTS],
        "top_n": 2,
        "return_documents": True,
        "max_tokens_per_doc": 4096,
        "priority": 3,
    }
    results = (await ask(engine, "/rerank", body))["results"]
    assert len(results) == 2
    for item in results:
        assert item["document"] == {"text": DOCUMENTS[item["index"]]}


async def test_long_documents_are_cut_or_read_in_windows(engine, saved):
    long = " ".join(["the plot went on and on"] * 30) + " three and a half million people"
    body = {"query": "good film", "documents": ["dull", long]}
    cut = (await ask(engine, "/rerank", body))["results"]
    by_index = {item["index"]: item["relevance_score"] for item in cut}
    wanted = saved.logits("good film", long, truncation="longest_first").sigmoid().item()
    assert by_index[1] == pytest.approx(wanted, abs=1e-5)
    error = await refused(engine, "/rerank", {**body, "truncate": False}, 400)
    assert "input[1] has" in error["message"]
    assert (await post(engine, "/score", {"text_1": "a", "text_2": long})).status_code == 400
    windowed = {**body, "stride": 5, "aggregate": "max", "windows": True}
    for item in (await ask(engine, "/rerank", windowed))["results"]:
        document = body["documents"][item["index"]]
        wanted = saved.windows("good film", document, stride=5)
        scores = [logits.sigmoid().item() for *_, logits in wanted]
        found = item["windows"]
        assert [(w["start"], w["end"]) for w in found] == [window[:2] for window in wanted]
        assert [window["score"] for window in found] == pytest.approx(scores, abs=1e-5)
        assert item["relevance_score"] == pytest.approx(max(scores), abs=1e-5)
    windowed["query"] = "good film " * 8
    error = await refused(engine, "/rerank", windowed, 400)
    assert "the first text of input[0] has" in error["message"]


async def test_max_tokens_per_doc_limits_documents(saved):
    long = ["a film people lives", "about", "a picture", "for about million people " * 20]
    cut = ["a film", "about", "a picture", "for about"]
    async with running(saved, "rerank", result_cache={"max_bytes": 10**6}) as engine:
        for options in ({}, {"stride": 5}, {"truncate": False}):
            asked = {"query": "good", "documents": long, "max_tokens_per_doc": 2, **options}
            found = await ask(engine, "/rerank", asked)
            scores = {item["index"]: item["relevance_score"] for item in found["results"]}
            wanted = relevance(saved, "good", cut)
            assert [scores[index] for index in range(4)] == pytest.approx(wanted, abs=1e-5)
        more = await ask(engine, "/rerank", {**asked, "documents": long[:1], "truncate": True,
                                             "max_tokens_per_doc": 4})  # fmt: skip
        (wanted,) = relevance(saved, "good", long[:1])
        assert more["results"][0]["relevance_score"] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "says", "param"),
    [
        ({"text_1": "a"}, 400, "text_1 and text_2", "text_1"),
        ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, 400, "2 texts", "text_1"),
        ({"text_1": [], "text_2": "a"}, 400, "0 texts", "text_1"),
        ({"text_1": "a", "text_2": []}, 400, "text_2 is empty", "text_2"),
        ({"text_1": "a", "text_2": ["b", 3]}, 400, "text_2[1]", "text_2[1]"),
        ({"text_1": "a", "text_2": "b", "truncate": 1}, 400, "truncate", "truncate"),
    ],
)
async def test_bad_score_requests_are_refused(engine, body, status, says, param):
    error = await refused(engine, "/score", body, status)
    assert says in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"query": "a", "documents": []}, 400, "documents is empty"),
        ({"query": "a", "documents": ["a"] * 11}, 400, "documents has 11 texts; a request may"),
        ({"query": ["a"], "documents": ["a"]}, 400, "query: expected `str"),
        ({"query": "a", "documents": ["a", {"title": "b"}]}, 400, "`text`"),
        ({"query": "a", "documents": ["a"], "top_n": -1}, 400, ">= 0"),
        ({"documents": ["a"]}, 400, "`query`"),
        ({"query": "a", "documents": ["a"], "max_tokens_per_doc": -1}, 400, ">= 0"),
    ],
)
async def test_bad_rerank_requests_are_refused(saved, body, status, says):
    async with running(saved, "rerank", max_texts=10) as engine:
        assert says in (await refused(engine, "/rerank", body, status))["message"]


async def test_a_cross_encoders_saved_activation_is_used(tmp_path):
    kept = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    saved = save(tmp_path, labels={0: "relevance"}, **kept)
    async with running(saved, "score") as engine:
        answer = await ask(engine, "/score", {"text_1": "a", "text_2": "b"})
    assert answer["data"][0]["score"] == pytest.approx(saved.logits("a", "b").item(), abs=1e-5)


async def test_a_model_that_cannot_do_a_task_is_a_config_error(tmp_path):
    path = save(tmp_path / "three").path
    for tasks, says in (
        (("score",), "a single label"),
        (("token-classification",), "ForTokenClassification; this is a BertForSequence"),
        (("fill-mask",), "whose tasks are classify, score, rerank, embed"),
    ):
        config = ClassifierConfig(name="tiny", model="tiny", tasks=tasks)
        with pytest.raises(ConfigError, match=says):
            await ClassifierEngine(config, path).start()
