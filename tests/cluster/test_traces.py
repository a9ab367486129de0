"""Spans of router, replica and vLLM in a live cluster, joined to one trace."""

from typing import Any

import httpx

from tests import otlp
from tests.cluster.conftest import RunningCluster

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
TEXT = "a-secret-text"


def test_vllms_span_is_a_child_of_the_engines_span(make_cluster: Any) -> None:
    with otlp.collect_spans() as received:
        cluster: RunningCluster = make_cluster("--set", f"tracing.endpoint={received.url}")
        try:
            with httpx.Client(base_url=cluster.http_url, timeout=120) as http:
                answer = http.post(
                    "/v1/completions",
                    json={"model": "smollm2", "prompt": TEXT, "max_tokens": 4},
                    headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
                )
                assert answer.status_code == 200
                label = {"model": "sentiment", "input": TEXT}
                assert http.post("/classify", json=label).status_code == 200
            # vLLM exports its spans every few seconds.
            received.wait_named("llm_request")
            received.wait_named("text_completion smollm2")
            received.wait_named("classify sentiment")
            received.wait_named("POST /v1/completions")
        finally:
            assert cluster.tandem("down").returncode == 0
    of_trace = [span for span in received.spans if span.trace_id == TRACE]
    by_id = {span.span_id: span for span in of_trace}
    engine = next(span for span in of_trace if span.name == "text_completion smollm2")
    (inner,) = [span for span in of_trace if span.parent_id == engine.span_id]
    assert inner.name == "llm_request"
    assert engine.attributes["gen_ai.usage.output_tokens"] == 4
    replica = by_id[engine.parent_id]
    link = by_id[replica.parent_id]
    router = by_id[link.parent_id]
    assert router.parent_id == PARENT
    assert (router.service, replica.service) == ("tandem.router", "tandem.generator-smollm2")
    assert not any(TEXT.encode() in raw for raw in received.raw)
