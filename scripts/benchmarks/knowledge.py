"""Knowledge bases: quality of searches in this repository's docs, query times, rate of ingest.

Quality: 50 questions whose section in ``docs`` is known, by words alone (BM25), by vectors alone,
and by both, with two encoders: the default classifier and the MiniLM from which it was made. Times:
one query at a time over HTTP, in a base of 100,000 passages. Ingest: the docs through the API,
against the same passages through ``/v1/embeddings`` alone.
"""

import argparse
import asyncio
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import httpx
import numpy as np

from benchmarks.report import Report, Table, print_progress
from benchmarks.rounds import Summary, percentile
from benchmarks.targets.tandem import tandem_with_pools
from cluster.admission.keys import KeyFileContents, digest, new_key
from cluster.applications.knowledge.encoder import TEXTS_PER_CALL
from cluster.applications.knowledge.store import Store
from cluster.applications.knowledge.table import BaseSettings, Row
from cluster.config.applications import KNOWLEDGE_PATH, KnowledgeConfig
from cluster.key_file import write_keys
from cluster.models.sentiment import packaged_encoder
from cluster.tasks.knowledge import Mode

ROOT = Path(__file__).parents[2]
QUESTIONS = Path(__file__).with_name("knowledge_questions.json")
TENANT = "bench"
PASSAGES, QUICK_PASSAGES = 100_000, 2000
QUERIES, QUICK_QUERIES = 300, 50
WARM_UP_QUERIES = 20
CONCURRENT_CALLS = 4
DOCUMENT_PASSAGES = 5000  # of the large base
DIMENSIONS = 384
TOP = 5
ENCODERS = ("sentiment", "minilm")
MODES: tuple[Mode, ...] = get_args(Mode)
GOALS = {"query_p95_ms": "<= 50"}

Ranks = Mapping[tuple[str, Mode], Sequence[int | None]]
"""Position of the section of each question among the passages, from 1; None: not found."""


def pools(directory: Path) -> dict[str, Any]:
    """Return the pools: both encoders, and the applications."""
    classifier = {"replicas": {"min": 1, "max": 1}, "resources": {"cpus": 0.25}}
    minilm = {"name": "minilm", "model": str(packaged_encoder()), "tasks": ["embed"]}
    return {
        "classifiers": [
            {"name": "sentiment", "model": "sentiment-minilm", **classifier},
            {**minilm, **classifier},
        ],
        "applications": {
            "encoder": "minilm",
            "replicas": {"min": 1, "max": 1},
            "knowledge": {"directory": str(directory)},
        },
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--passages", type=int, help="size of the large base (100,000)")


def run(args: argparse.Namespace) -> Report:
    num_passages = args.passages or (QUICK_PASSAGES if args.quick else PASSAGES)
    questions = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    with TemporaryDirectory() as directory:
        build_s = asyncio.run(fill_base(Path(directory), num_passages))
        print_progress(0, "large base", f"{num_passages} passages in {build_s:.1f} s")
        with _cluster(Path(directory)) as client:
            rates: dict[str, list[float]] = defaultdict(list)
            for number in range(args.rounds):
                for name, rate in measure_ingest(client, number).items():
                    rates[name].append(rate)
                    print_progress(number, name, f"{rate:.1f} passages/s")
            ranks, found = measure_quality(client, questions)
            num_queries = QUICK_QUERIES if args.quick else QUERIES
            texts = [each["question"] for each in questions["answered"]]
            p95_ms = [measure_queries(client, texts, num_queries) for _ in range(args.rounds)]
    return make_report(ranks, found, rates, p95_ms)


@contextmanager
def _cluster(directory: Path) -> Iterator[httpx.Client]:
    key = new_key()
    with TemporaryDirectory() as keys:
        file = Path(keys) / "keys.yaml"
        entries = [{"sha256": digest(key), "tenant": TENANT}]
        write_keys(file, KeyFileContents.model_validate({"keys": entries}))
        router = {"keys_file": str(file)}
        with tandem_with_pools(pools(directory), "minilm", router) as running:
            headers = {"authorization": f"Bearer {key}"}
            url = running.endpoint.url
            with httpx.Client(base_url=url, headers=headers, timeout=600) as client:
                yield client


async def fill_base(directory: Path, num_passages: int) -> float:
    """Create the base `large` with random words and vectors, index it, and return the seconds."""
    rng, words = np.random.default_rng(0), _words()
    weights = 1 / np.arange(1, len(words) + 1)
    weights /= weights.sum()
    settings = BaseSettings("minilm", DIMENSIONS, 200, "English")
    store = Store(str(directory), KnowledgeConfig(store_timeout_s=600))
    table = await store.create(TENANT, "large", settings)
    started_s = time.perf_counter()
    for first in range(0, num_passages, DOCUMENT_PASSAGES):
        count = min(DOCUMENT_PASSAGES, num_passages - first)
        chosen = rng.choice(len(words), (count, 100), p=weights)
        rows = [
            Row(f"{first + index}", index, " ".join(words[i] for i in row), 0, [], None, 0, 1)
            for index, row in enumerate(chosen)
        ]
        vectors = rng.normal(size=(count, DIMENSIONS)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        await table.replace_document(f"{first}.txt", {"id": f"{first}.txt"}, rows, vectors)
    await store.close()
    await table.maintain(store.config.index_passages)
    return time.perf_counter() - started_s


def _words() -> list[str]:
    """Return the words of the docs, frequent ones first."""
    counts: dict[str, int] = defaultdict(int)
    for file in documents():
        for word in file.read_text(encoding="utf-8").split():
            counts[word] += 1
    return sorted(counts, key=lambda word: (-counts[word], word))


def documents() -> list[Path]:
    return sorted((ROOT / "docs").rglob("*.md"))


def measure_ingest(client: httpx.Client, number: int) -> dict[str, float]:
    """Add the docs with each encoder, and embed the same texts alone; return passages/s."""
    rates = {}
    for encoder in ENCODERS:
        base = f"docs-{encoder}"
        if number:
            _post(client.delete(f"{KNOWLEDGE_PATH}/{base}"))
        _post(client.post(KNOWLEDGE_PATH, json={"name": base, "model": encoder}))
        started_s = time.perf_counter()
        with ThreadPoolExecutor(CONCURRENT_CALLS) as threads:
            added = list(threads.map(lambda file, to=base: _add(client, to, file), documents()))
        rates[f"ingest {encoder}"] = sum(added) / (time.perf_counter() - started_s)
    texts = _passages(client, f"docs-{ENCODERS[-1]}")
    batches = [texts[at : at + TEXTS_PER_CALL] for at in range(0, len(texts), TEXTS_PER_CALL)]
    started_s = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENT_CALLS) as threads:
        list(threads.map(lambda batch: _embed(client, batch), batches))
    rates["encoder alone"] = len(texts) / (time.perf_counter() - started_s)
    return rates


def _add(client: httpx.Client, base: str, file: Path) -> int:
    id_ = file.relative_to(ROOT / "docs").as_posix()
    files = {"file": (file.name, file.read_bytes())}
    url = f"{KNOWLEDGE_PATH}/{base}/documents"
    embedded: int = _post(client.post(url, files=files, data={"id": id_}))["embedded"]
    return embedded


def _passages(client: httpx.Client, base: str) -> list[str]:
    """Return most passages of a base, by many searches."""
    found: dict[tuple[str, int], str] = {}
    for word in _words()[:400:4]:
        body = {"query": word, "limit": 100, "mode": "text"}
        answer = _post(client.post(f"{KNOWLEDGE_PATH}/{base}/search", json=body))
        for each in answer["passages"]:
            found[each["document"], each["start"]] = each["text"]
    return list(found.values())


def _embed(client: httpx.Client, texts: Sequence[str]) -> None:
    body = {"model": ENCODERS[-1], "input": texts, "encoding_format": "base64", "truncate": True}
    _post(client.post("/v1/embeddings", json=body))


def _post(response: httpx.Response) -> Any:
    response.raise_for_status()
    return response.json()


def measure_quality(
    client: httpx.Client, questions: Mapping[str, Sequence[Any]]
) -> tuple[Ranks, dict[str, dict[str, list[float]]]]:
    """Return the rank of each question's section, and the relevance of the best passages."""
    ranks: dict[tuple[str, Mode], list[int | None]] = defaultdict(list)
    relevance: dict[str, dict[str, list[float]]] = {}
    for encoder in ENCODERS:
        url = f"{KNOWLEDGE_PATH}/docs-{encoder}/search"
        relevance[encoder] = {"answered": [], "unanswered": []}
        for asked in questions["answered"]:
            for mode in MODES:
                body = {"query": asked["question"], "limit": 10, "mode": mode}
                passages = _post(client.post(url, json=body))["passages"]
                ranks[encoder, mode].append(rank_of(asked, passages))
                if mode == "hybrid":
                    relevance[encoder]["answered"].append(_best(passages))
        for question in questions["unanswered"]:
            body = {"query": question, "limit": 10}
            passages = _post(client.post(url, json=body))["passages"]
            relevance[encoder]["unanswered"].append(_best(passages))
    return ranks, relevance


def _best(passages: Sequence[Mapping[str, Any]]) -> float:
    return max((float(each["relevance"]) for each in passages[:6]), default=0.0)


def rank_of(asked: Mapping[str, str], passages: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the position, from 1, of the first passage of a question's section."""
    for position, passage in enumerate(passages, 1):
        is_section = asked["heading"] in passage["heading"]
        if passage["document"] == asked["document"] and is_section:
            return position
    return None


def measure_queries(client: httpx.Client, questions: Sequence[str], num_queries: int) -> float:
    """Return the 95th percentile of the time of a query in the large base, in milliseconds."""
    rng = random.Random(0)
    times = []
    for number in range(WARM_UP_QUERIES + num_queries):
        # Different words each time, so that no cache has the embedding.
        body = {"query": f"{rng.choice(questions)} {number}", "limit": TOP}
        started_s = time.perf_counter()
        _post(client.post(f"{KNOWLEDGE_PATH}/large/search", json=body))
        if number >= WARM_UP_QUERIES:
            times.append(time.perf_counter() - started_s)
    return percentile(times, 95) * 1e3


def recall(ranks: Sequence[int | None]) -> float:
    """Return the share of questions whose section is among the best passages."""
    return sum(rank is not None and rank <= TOP for rank in ranks) / len(ranks)


def reciprocal_rank(ranks: Sequence[int | None]) -> float:
    """Return the mean reciprocal rank within ten passages."""
    return sum(1 / rank for rank in ranks if rank is not None) / len(ranks)


def make_report(
    ranks: Ranks,
    relevance: Mapping[str, Mapping[str, Sequence[float]]],
    rates: Mapping[str, Sequence[float]],
    p95_ms: Sequence[float],
) -> Report:
    """Return the tables of quality and rates."""
    keys = {"query_p95_ms": Summary(tuple(p95_ms))}
    quality = []
    for (encoder, mode), found in ranks.items():
        values = recall(found), reciprocal_rank(found)
        quality.append((encoder, mode, *values))
        for name, value in zip(("recall_at_5", "mrr"), values, strict=True):
            keys[f"{encoder}_{mode}_{name}"] = Summary((value,))
    alone = Summary(tuple(rates["encoder alone"]))
    keys["ingest_share_of_encoder"] = Summary(tuple(rates["ingest minilm"])).over(alone)
    threshold = KnowledgeConfig().threshold
    passed = [
        (encoder, kind, sum(value >= threshold for value in values) / len(values))
        for encoder, kinds in relevance.items()
        for kind, values in kinds.items()
    ]
    return Report(
        keys=keys,
        goals=GOALS,
        tables=[
            Table("Quality", ("encoder", "mode", "recall@5", "MRR"), quality),
            Table(
                f"Share of questions above the threshold {threshold:g}",
                ("encoder", "questions", "share"),
                passed,
            ),
            Table(
                "Passages/s",
                ("", "rate"),
                [(name, Summary(tuple(values))) for name, values in rates.items()],
            ),
        ],
        details={"relevance": {name: dict(kinds) for name, kinds in relevance.items()}},
    )
