"""Result cache behind the HTTP API."""

import pytest

from tests.serve.classifier_kit import (  # noqa: F401
    PAIRS,
    TEXTS,
    ask,
    one_thread,
    post,
    refused,
    running,
    save,
)

BIG = {"max_bytes": 1 << 20}
LONG = "the good film was not a dull one. Anna Berger lives in Berlin, unforgettable. " * 6


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("bert"))


def cached(saved, *tasks, **cache):
    return running(saved, *tasks, result_cache={**BIG, **cache})


def counts(engine):
    found = engine.counts()
    return found.cache_hits, found.cache_misses, found.texts


async def ask_for_results(engine, path, body):
    """Return a reply without what differs between equal requests."""
    reply = await ask(engine, path, body)
    return {name: value for name, value in reply.items() if name not in ("id", "created")}


async def test_the_cache_is_off_by_default(saved):
    async with running(saved, "classify") as engine:
        for _ in range(2):
            await ask(engine, "/classify", {"input": "good"})
        assert counts(engine) == (0, 0, 2)


async def test_a_text_is_computed_once_and_the_reply_stays_the_same(saved):
    async with cached(saved, "classify", "embed") as engine:
        body = {"input": [*TEXTS, *map(list, PAIRS)]}
        first = await ask_for_results(engine, "/classify", body)
        assert counts(engine) == (0, 9, 9)
        assert await ask_for_results(engine, "/classify", body) == first
        assert counts(engine) == (9, 9, 9)
        mixed = {"input": [TEXTS[3], "new", TEXTS[0]], "top_k": 1}
        answer = await ask_for_results(engine, "/classify", mixed)
        assert counts(engine) == (11, 10, 10)
        for index, source in ((0, 3), (2, 0)):
            assert answer["data"][index]["label"] == first["data"][source]["label"]
            assert answer["data"][index]["score"] == first["data"][source]["score"]
        vectors = await ask_for_results(engine, "/v1/embeddings", {"input": TEXTS})
        assert counts(engine) == (11, 15, 15)
        assert await ask_for_results(engine, "/v1/embeddings", {"input": TEXTS}) == vectors
        assert counts(engine) == (16, 15, 15)


async def test_options_are_part_of_the_key(saved):
    async with cached(saved, "classify") as engine:
        bodies = [
            {"truncate": "left"},
            {"truncate": True},
            {"stride": 5, "windows": True},
            {"stride": 6, "windows": True},
        ]
        plain = [
            await ask_for_results(engine, "/classify", {"input": LONG, **body}) for body in bodies
        ]
        assert counts(engine)[:2] == (0, 4)
        again = [
            await ask_for_results(engine, "/classify", {"input": LONG, **body}) for body in bodies
        ]
        assert again == plain
        assert counts(engine)[:2] == (4, 4)
        both = await ask_for_results(engine, "/classify", {"input": ["good", LONG], **bodies[2]})
        assert both["data"][1]["windows"] == plain[2]["data"][0]["windows"]
        maximum = {"input": LONG, "stride": 5, "aggregate": "max"}
        assert (await ask_for_results(engine, "/classify", maximum))["data"] != plain[2]["data"]
        assert counts(engine)[:2] == (6, 5)


async def test_entities_are_cached(tmp_path):
    saved = save(tmp_path, "bert", "ForTokenClassification")
    async with cached(saved, "token-classification") as engine:
        body = {"input": [*TEXTS, LONG], "stride": 4}
        first = await ask_for_results(engine, "/ner", body)
        assert await ask_for_results(engine, "/ner", body) == first
        assert counts(engine)[:2] == (6, 6)


async def test_errors_name_the_index_in_the_whole_request(saved):
    async with cached(saved, "classify") as engine:
        await ask(engine, "/classify", {"input": ["a", "b"]})
        error = await refused(engine, "/classify", {"input": ["a", "b", LONG]}, 400)
        assert error["message"].startswith("input[2] has")
        await ask(engine, "/classify", {"input": ["a", "b"]})


async def test_token_ids_bypass_the_cache(saved):
    async with cached(saved, "embed") as engine:
        for _ in range(2):
            await ask(engine, "/v1/embeddings", {"input": [5, 6, 7]})
        assert counts(engine) == (0, 0, 2)


async def test_tenants_share_no_results_if_isolated(saved):
    async def classify(engine, tenant):
        headers = {"x-tandem-tenant": tenant} if tenant else None
        assert (await post(engine, "/classify", {"input": "good"}, headers)).status_code == 200

    tenants = ("one", "two", None, "one", "two", None)
    for isolate, hits in ((True, 3), (False, 5)):
        async with cached(saved, "classify", isolate_tenants=isolate) as engine:
            for tenant in tenants:
                await classify(engine, tenant)
            assert counts(engine)[0] == hits


async def test_score_and_rerank_share_results(tmp_path):
    saved = save(tmp_path, labels={0: "relevance"})
    async with cached(saved, "score", "rerank") as engine:
        await ask(engine, "/score", {"text_1": "good", "text_2": TEXTS, "truncate": True})
        await ask(engine, "/rerank", {"query": "good", "documents": TEXTS})
        assert counts(engine) == (5, 5, 5)
