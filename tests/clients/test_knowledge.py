"""Knowledge bases whose results the cluster's cross-encoder orders."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.clients.conftest import Server

BASE = "/v1/knowledge/capitals"
TEXTS = (
    "paris is the capital of france",
    "berlin is the capital",
    "france is the capital of berlin",
    "the capital is the capital of paris",
    "of the france the berlin",
    "capital capital capital",
)
QUERIES = ("the capital of france", "berlin", "is paris the capital")


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {server.key}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        post(client, "/v1/knowledge", {"name": "capitals"})
        for number, text in enumerate(TEXTS):
            files = {"file": (f"{number}.txt", text)}
            client.post(f"{BASE}/documents", files=files).raise_for_status()
        yield client
        client.delete(BASE).raise_for_status()


def post(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def search(http: httpx.Client, query: str, **fields: Any) -> tuple[list[str], bool | None]:
    """Return the texts that are found, and whether they are reranked."""
    found = post(http, f"{BASE}/search", {"query": query, **fields})
    return [passage["text"] for passage in found["passages"]], found["reranked"]


def order_of_scores(http: httpx.Client, query: str) -> list[str]:
    body = {"model": "reranker", "query": query, "documents": TEXTS}
    results = post(http, "/rerank", body)["results"]
    scores = {result["index"]: result["relevance_score"] for result in results}
    assert len(set(scores.values())) == len(TEXTS)
    return [TEXTS[index] for index in sorted(scores, key=lambda index: -scores[index])]


def test_the_scores_of_the_reranker_order_the_passages(http: httpx.Client) -> None:
    changed = []
    for query in QUERIES:
        plain, reranked = search(http, query, rerank=False)
        assert (sorted(plain), reranked) == (sorted(TEXTS), None)
        expected = order_of_scores(http, query)
        assert search(http, query) == (expected, True)
        assert search(http, query, limit=2) == (expected[:2], True)
        changed.append(expected != plain)
    assert any(changed)
