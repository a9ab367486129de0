"""Classifier of the default deployment through the clients and requests of other servers."""

from typing import Any

import httpx
import numpy as np
import pytest
from huggingface_hub import InferenceClient

from tests.cluster.conftest import RunningCluster

TEXTS = ["I loved this film.", "A boring mess."]


def ask(http: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_hugging_faces_client(cluster: RunningCluster) -> None:
    by_path = InferenceClient(model=f"{cluster.http_url}/models/sentiment")
    alone = InferenceClient(base_url=cluster.http_url)
    for client in (by_path, alone):
        best, _ = client.text_classification(TEXTS[0])
        assert best.label == "POSITIVE"
        assert best.score > 0.5
        scores = client.sentence_similarity(TEXTS[0], other_sentences=TEXTS)
        assert scores[0] == pytest.approx(1, abs=0.01)
        assert scores[1] < scores[0]
    vectors = InferenceClient(model=f"{cluster.http_url}/embed").feature_extraction(TEXTS[0])
    assert vectors.shape == (1, 384)
    assert np.linalg.norm(vectors) == pytest.approx(1, abs=1e-3)


def test_requests_of_vllms_pooling_api(http: httpx.Client) -> None:
    # As `vllm bench serve --backend openai-embeddings` sends them.
    body = {"model": "sentiment", "input": "word " * 2000, "truncate_prompt_tokens": -1}
    answer = ask(http, "/v1/embeddings", body)
    assert answer["usage"]["prompt_tokens"] == 512
    plain = ask(http, "/v1/embeddings", {"input": TEXTS})
    rows = np.array([item["embedding"] for item in plain["data"]], np.float32)
    raw = http.post(
        "/v1/embeddings", json={"input": TEXTS, "encoding_format": "bytes", "colour": 1}
    )
    np.testing.assert_allclose(np.frombuffer(raw.content, "<f4").reshape(2, -1), rows, atol=0.01)
    assert "metadata" in raw.headers
    assert raw.headers["x-tandem-warning"] == "ignored unknown fields: colour"
    item = ask(http, "/classify", {"input": TEXTS[0], "truncate_prompt_tokens": 8})["data"][0]
    assert item["num_classes"] == len(item["probs"]) == 2
    assert sum(item["probs"]) == pytest.approx(1, abs=0.01)
    assert len(ask(http, "/pooling", {"model": "sentiment", "input": TEXTS})["data"]) == 2


def test_tokenizers_of_both_kinds_of_pools(http: httpx.Client) -> None:
    text = "A film."
    generators = ask(http, "/tokenize", {"prompt": text})
    assert generators == ask(http, "/tokenize", {"prompt": text, "model": "smollm2"})
    (tokens,) = ask(http, "/tokenize", {"inputs": text})
    classifiers = ask(http, "/tokenize", {"prompt": text, "model": "sentiment"})
    assert [token["id"] for token in tokens] == classifiers["tokens"]
    back = ask(http, "/detokenize", {"tokens": classifiers["tokens"][1:-1], "model": "sentiment"})
    assert back["prompt"] == "a film."
    assert http.get("/info").json()["served_model_name"] == "sentiment"
