"""Tensor parallelism of 2 in a Serve replica's placement group, and the spans of its requests.

The model has 8-bit weights and activations, written by ``tandem models quantize``.
``test_engine_processes`` compares the text of two workers with that of one.
"""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cluster.launch import processes
from cluster.models import store
from cluster.models.quantize import QuantizeOptions, packaged_texts, quantize
from tests import otlp
from tests.cluster.conftest import RunningCluster, router_config, serve_config, wait_until
from tests.cluster.tiny_llama import make_tiny_llama

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
TEXT = "a-secret-text"


@pytest.fixture(scope="module")
def spans() -> Iterator[otlp.SpanCollector]:
    with otlp.collect_spans() as received:
        yield received


@pytest.fixture(scope="module")
def traced(
    spans: otlp.SpanCollector, make_cluster: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCluster]:
    """Start a generator with two workers and a classifier, whose spans are collected."""
    directory = tmp_path_factory.mktemp("model")
    make_tiny_llama(directory / "tiny-llama", store.resolve("smollm2-135m-instruct"))
    model = directory / "tiny-llama-w8a8"
    texts = packaged_texts("calibration")
    quantize(directory / "tiny-llama", model, QuantizeOptions("w8a8"), texts)
    generator = {
        "name": "two",
        "model": str(model),
        "tensor_parallel_size": 2,
        "max_model_len": 256,
        "kv_cache_memory_bytes": "64MiB",
        "dtype": "float32",
        "resources": {"cpus": 0.5},
    }
    classifier = {"name": "sentiment", "model": "sentiment-minilm", "resources": {"cpus": 0.25}}
    running: RunningCluster = make_cluster(
        config=serve_config(
            generators=[generator],
            classifiers=[classifier],
            router=router_config(1),
            tracing={"endpoint": spans.url},
        )
    )
    yield running
    running.down()


@pytest.fixture
def http(traced: RunningCluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=traced.http_url, timeout=120) as client:
        yield client


def test_two_workers_serve_an_8_bit_model(traced: RunningCluster, http: httpx.Client) -> None:
    body = {"model": "two", "prompt": "Hello there", "max_tokens": 24, "temperature": 0}
    texts = set()
    for _ in range(2):
        answer = http.post("/v1/completions", json={**body, "ignore_eos": True})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 24
        texts.add(answer.json()["choices"][0]["text"])
    assert len(texts) == 1
    names = " ".join(owned.name for owned in processes.find(traced.home))
    assert names.count("VLLM::Worker") == 2, names


def test_vllms_span_is_a_child_of_the_engines_span(
    http: httpx.Client, spans: otlp.SpanCollector
) -> None:
    answer = http.post(
        "/v1/completions",
        json={"model": "two", "prompt": TEXT, "max_tokens": 4, "ignore_eos": True},
        headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
    )
    assert answer.status_code == 200
    label = {"model": "sentiment", "input": TEXT}
    assert http.post("/classify", json=label).status_code == 200

    def of_trace() -> list[otlp.ReceivedSpan]:
        return [span for span in spans.spans if span.trace_id == TRACE]

    # Router, link, replica, engine and vLLM, which export their spans every few seconds.
    wait_until(lambda: len(of_trace()) == 5, 60, "the export of the spans")
    spans.wait_named("classify sentiment", 60)
    by_id = {span.span_id: span for span in of_trace()}
    engine = next(span for span in of_trace() if span.name == "text_completion two")
    (inner,) = [span for span in of_trace() if span.parent_id == engine.span_id]
    assert inner.name == "llm_request"
    assert engine.attributes["gen_ai.usage.output_tokens"] == 4
    replica = by_id[engine.parent_id]
    link = by_id[replica.parent_id]
    router = by_id[link.parent_id]
    assert router.parent_id == PARENT
    assert (router.service, replica.service) == ("tandem.router", "tandem.generator-two")
    assert not any(TEXT.encode() in raw for raw in spans.raw)
