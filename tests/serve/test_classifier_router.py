"""Every task from configuration to client, with real router, links and engines."""

from contextlib import AsyncExitStack

import pytest

from cluster.config import ClassifierConfig, parse
from cluster.engines.classifier.engine import ClassifierEngine
from cluster.engines.classifier.paths import PATHS
from cluster.engines.classifier.serving.routes import routes
from cluster.engines.classifier.serving.tasks import TASKS
from cluster.gateway import Gateway, GatewayApp, ReplicaInfo, Wiring
from cluster.link import LinkServer
from tests import asgi
from tests.serve import classifier_kit
from tests.serve.classifier_kit import (  # noqa: F401
    one_thread,
    save,
    until,
)

SECRET = b"s" * 32
ONE_LABEL = {"labels": {0: "relevance"}}
POOLS = {
    "labels": ("ForSequenceClassification", ("classify", "embed"), {}),
    "entities": ("ForTokenClassification", ("token-classification",), {}),
    "pairs": ("ForSequenceClassification", ("score", "rerank"), ONE_LABEL),
    "masks": ("ForMaskedLM", ("fill-mask",), {}),
    "sentences": ("ForNextSentencePrediction", ("next-sentence",), {}),
}
PARTS = "tokenize", "queue", "compute"
PAIR = [["good film", "the plot went on"]]
SCORED = {"text_1": "good film", "text_2": ["the plot", "Berlin"]}
RANKED = {"query": "good film", "documents": ["the plot", "Berlin"]}
REQUESTS = {
    "/classify": ("labels", {"input": ["good film", "dull"]}),
    "/v1/embeddings": ("labels", {"input": ["good film", "dull"]}),
    "/token-classification": ("entities", {"input": "Anna Berger lives in Berlin"}),
    "/ner": ("entities", {"input": "Anna Berger lives in Berlin"}),
    "/score": ("pairs", SCORED),
    "/v1/score": ("pairs", SCORED),
    "/rerank": ("pairs", RANKED),
    "/v1/rerank": ("pairs", RANKED),
    "/v2/rerank": ("pairs", RANKED),
    "/fill-mask": ("masks", {"input": "the [MASK] film"}),
    "/next-sentence": ("sentences", {"input": PAIR}),
}


class Site:
    """Router with one engine per pool."""

    def __init__(self, directory) -> None:
        self._paths = {
            name: save(directory / name, "bert", head, **changes).path
            for name, (head, _, changes) in POOLS.items()
        }
        fields = {"model": "m", "threads": 1, "dtype": "float32"}
        pools = [{"name": name, "tasks": tasks, **fields} for name, (_, tasks, _) in POOLS.items()]
        self.config = parse({"classifiers": pools})
        self.engines = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "Site":
        gateway = Gateway(self.config, {name: Wiring(SECRET) for name in POOLS})
        for pool in self.config.classifiers:
            engine = self.engines[pool.name] = ClassifierEngine(pool, self._paths[pool.name])
            await engine.start()
            self._stack.push_async_callback(engine.stop)
            link = LinkServer(engine.app, SECRET)
            host, port = await link.start()
            self._stack.push_async_callback(link.stop)
            info = ReplicaInfo(f"{pool.name}-1", host, port, engine.routes())
            gateway.pools[pool.name].update([info])
        self._stack.push_async_callback(gateway.close)
        self.app = GatewayApp(gateway)
        return self

    async def __aexit__(self, *_) -> None:
        await self._stack.aclose()


@pytest.fixture
async def site(tmp_path):
    async with Site(tmp_path) as site:
        yield site


def test_the_router_knows_the_paths_of_all_classifiers():
    configs = [ClassifierConfig(name="cls", model="m", tasks=[task]) for task in TASKS]
    assert {path for config in configs for path in routes(config)} == PATHS


async def test_the_router_returns_the_engines_replies_and_timings(site):
    for path, (pool, body) in REQUESTS.items():
        wanted = await classifier_kit.ask(site.engines[pool], path, body)
        for named in ({}, {"model": pool}):
            answer = await asgi.post(site.app, path, {**body, **named})
            assert answer.status == 200, answer.body
            same = {"id": 0, "created": 0}  # those differ
            assert {**answer.json(), **same} == {**wanted, **same}
            times = [answer.headers[f"x-tandem-{part}-ms"] for part in PARTS]
            assert all(float(time) >= 0 for time in times)
            assert float(times[-1]) > 0
    known = (await asgi.get(site.app, "/openapi.json")).json()["paths"]
    assert REQUESTS.keys() <= known.keys()


async def test_odd_inputs_have_a_defined_answer(site):
    async def ask(body):
        answer = await asgi.post(site.app, "/classify", body)
        return answer.status, answer.json()

    texts = [f"good {'film ' * (index % 7)}" for index in range(10_000)]
    many = await ask({"model": "labels", "input": texts})
    few = await ask({"model": "labels", "input": texts[:7]})
    scores = [[item["score"] for item in found["data"]] for _, found in (many, few)]
    assert scores[0] == pytest.approx((scores[1] * 1429)[:10_000], abs=1e-5)
    assert (await ask({"input": [*texts, "good"]}))[0] == 400
    assert (await ask({"input": []}))[0] == 400
    assert (await ask(b'{"input": "\xff"}'))[0] == 400
    assert (await ask({"input": "good " * 20_000}))[0] == 400
    assert (await ask({"input": "good " * 20_000, "truncate": True}))[0] == 200
    for text in ("", "\x00\x07\x1b\x7f"):
        assert (await ask({"input": text}))[0] == 200


async def test_the_engine_skips_texts_of_a_disconnected_client(site, gate):
    engine = site.engines["labels"]
    go_on = gate(engine)
    first = asgi.start(site.app, "POST", "/classify", {"input": "good"})
    await until(lambda: engine.load().running)
    second = asgi.start(site.app, "POST", "/classify", {"input": ["dull film"] * 100})
    await until(lambda: engine.counts().queued_tokens)
    await second.cancel()  # as Serve does
    await until(lambda: engine.counts().skipped_texts == 100)
    go_on.release(1000)
    assert (await first.done()).status == 200
    assert engine.counts().texts == 1
