"""HTTP API of a real cluster, through the vendors' clients."""

import base64
import concurrent.futures
import contextlib
import json
import re
import struct
import time
from typing import Any

import anthropic
import httpx
import openai
import pytest

from cluster.monitoring.foreign import VLLM
from tests.cluster.conftest import ALIASES, CLASSIFIER_ALIASES, RunningCluster

MODEL = "smollm2"
PARIS: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=PARIS, temperature=0, max_tokens=32
    )
    assert "Paris" in str(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_tokens_are_streamed_as_they_are_generated(client: openai.OpenAI) -> None:
    # If the tokens arrived together at the end, the longest gap would be the whole time, in each of
    # these streams. If the machine stalls, it is in one of them.
    assert any(longest_gap(client) < 0.8 for _ in range(5))


def longest_gap(client: openai.OpenAI) -> float:
    """Return the longest gap in a stream as a part of its time; 1 if most tokens are merged."""
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Count to fifty."}],
        temperature=0,
        max_tokens=48,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    pieces, usage, last = [], None, time.perf_counter()
    longest, total = 0.0, 0.0
    for chunk in stream:
        now = time.perf_counter()
        longest, total, last = max(longest, now - last), total + now - last, now
        pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
        usage = chunk.usage or usage
    assert usage is not None
    assert usage.completion_tokens == 48
    # Below 48 because vLLM merges the tokens of steps between which the stream was not read.
    return longest / total if len(pieces) > 16 else 1.0


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["Once upon a time", "The sea"], max_tokens=8, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.text for choice in answer.choices)


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL,
        input="What is the capital of France?",
        temperature=0,
        max_output_tokens=32,
        store=False,
    )
    assert "Paris" in answer.output_text


def test_anthropic_messages(claude: anthropic.Anthropic) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": PARIS, "max_tokens": 32}
    greedy = {"temperature": 0}
    answer = claude.messages.create(extra_body=greedy, **ask)
    assert "Paris" in answer.content[0].text
    with claude.messages.stream(extra_body=greedy, **ask) as stream:
        assert "Paris" in "".join(stream.text_stream)


def test_json_schema_output(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=PARIS,
        temperature=0,
        max_tokens=512,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": schema, "strict": True},
        },
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    # 20 characters, a boolean and the schema's own characters are at most about 40 tokens; with
    # free whitespace, the model does not end before max_tokens.
    assert answer.usage is not None
    assert answer.usage.completion_tokens < 64
    parsed = json.loads(str(choice.message.content))
    assert set(parsed) == {"city", "big"}
    assert isinstance(parsed["big"], bool)


def test_tokenize_and_detokenize(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"model": MODEL, "prompt": "Hello, world"}).json()
    assert tokens["count"] == len(tokens["tokens"]) > 0
    text = http.post("/detokenize", json={"model": MODEL, "tokens": tokens["tokens"]}).json()
    assert text["prompt"] == "Hello, world"


def test_classify(http: httpx.Client) -> None:
    glowing = "An absolute masterpiece: moving, funny and beautifully acted. I loved it."
    scathing = "A dull, clumsy mess with terrible acting and a complete waste of time."
    answer = http.post("/classify", json={"input": [glowing, scathing]}).json()
    assert answer["object"] == "list"
    assert answer["model"] == "sentiment"
    assert [row["label"] for row in answer["data"]] == ["POSITIVE", "NEGATIVE"]
    for index, row in enumerate(answer["data"]):
        assert row["index"] == index
        assert row["scores"][0] == {"label": row["label"], "score": row["score"]}
        assert sum(score["score"] for score in row["scores"]) == pytest.approx(1, abs=1e-4)
    assert answer["usage"]["prompt_tokens"] > 10
    top = http.post("/classify", json={"input": glowing, "model": "sentiment", "top_k": 1}).json()
    assert len(top["data"][0]["scores"]) == 1


def test_a_label_is_explained_by_words_and_the_page_is_served(http: httpx.Client) -> None:
    body = {"input": "It broke after two days and support never answered.", "explain": True}
    why = http.post("/classify", json=body).json()["data"][0]["explanation"]
    negative = why["labels"][0]
    assert negative["label"] == "NEGATIVE"
    difference = negative["score"] - negative["baseline"]
    assert sum(negative["contributions"]) == pytest.approx(difference, rel=0.02)
    by_word = dict(zip([w["text"] for w in why["words"]], negative["contributions"], strict=True))
    assert {"broke", "never"} <= set(sorted(by_word, key=lambda word: -by_word[word])[:4])
    page = http.get("/explain")
    assert page.headers["content-type"].startswith("text/html")
    assert "<option>sentiment</option>" in page.text


def test_a_text_over_the_context_length_is_rejected_or_truncated(http: httpx.Client) -> None:
    long = "word " * 3000
    refused = http.post("/classify", json={"input": long})
    assert refused.status_code == 400
    assert "512" in refused.json()["error"]["message"]
    assert http.post("/classify", json={"input": long, "truncate": True}).status_code == 200


def test_embeddings(client: openai.OpenAI, http: httpx.Client) -> None:
    texts = ["a cat sits on the mat", "a kitten rests on the rug", "shares fell sharply"]
    answer = client.embeddings.create(model="sentiment", input=texts, encoding_format="float")
    vectors = [row.embedding for row in answer.data]
    assert [len(vector) for vector in vectors] == [384] * 3

    def dot(left: list[float], right: list[float]) -> float:
        return sum(a * b for a, b in zip(left, right, strict=True))

    assert dot(vectors[0], vectors[0]) == pytest.approx(1, abs=1e-3)
    assert dot(vectors[0], vectors[1]) > dot(vectors[0], vectors[2])
    body = {"input": texts[0], "encoding_format": "base64"}
    encoded = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    decoded = struct.unpack("<384f", base64.b64decode(encoded))
    assert list(decoded) == pytest.approx(vectors[0], abs=1e-3)


def test_models(client: openai.OpenAI) -> None:
    names = [MODEL, *ALIASES, "sentiment", *CLASSIFIER_ALIASES]
    assert [model.id for model in client.models.list()] == names
    assert [client.models.retrieve(name).id for name in names] == names
    roots = [model.model_extra["root"] for model in client.models.list() if model.id == MODEL]
    assert roots == [MODEL]  # not the path of its files


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_are_answered_under_the_name(
    client: openai.OpenAI, http: httpx.Client, alias: str
) -> None:
    ask: dict[str, Any] = {"model": alias, "max_tokens": 2}
    answers: list[Any] = [
        client.chat.completions.create(messages=PARIS, **ask),
        client.completions.create(prompt="One", **ask),
        client.responses.create(model=alias, input="Hi", max_output_tokens=2),
        *client.chat.completions.create(messages=PARIS, stream=True, **ask),
    ]
    assert {answer.model for answer in answers} == {MODEL}
    message = http.post("/v1/messages", json={**ask, "messages": PARIS}).json()
    assert message["model"] == MODEL
    assert http.post("/tokenize", json={"model": alias, "prompt": "One"}).json()["count"] > 0
    assert alias not in http.get("/metrics").text


def test_aliases_of_classifiers(http: httpx.Client) -> None:
    for path in ("/classify", "/v1/embeddings"):
        answer = http.post(path, json={"model": CLASSIFIER_ALIASES[0], "input": "fine"})
        assert answer.json()["model"] == "sentiment"


def test_builtin_paths(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/ready").json()["status"] == "ready"
    assert {"tandem", "ray", "torch"} <= http.get("/version").json().keys()
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/messages", "/classify", "/health"} <= paths.keys()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"model": "nope", "messages": PARIS}, 404),
        ("/v1/chat/completions", {"model": MODEL}, 400),
        ("/v1/chat/completions", {"model": MODEL, "messages": PARIS, "max_tokens": -1}, 400),
        ("/v1/chat/completions", {"model": MODEL, "messages": PARIS, "max_tokens": 10**6}, 400),
        ("/v1/completions", {"model": MODEL, "prompt": "word " * 5000}, 400),
        ("/v1/chat/completions", "{", 400),
        ("/v1/chat/completions", {"model": "sentiment", "messages": PARIS}, 400),
        ("/classify", {"input": 3}, 400),
        ("/classify", {"input": []}, 400),
        ("/no/such/path", {}, 404),
        ("/metrics", {}, 405),
    ],
)
def test_errors_have_openais_format(http: httpx.Client, path: str, body: Any, status: int) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    answer = http.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert "Traceback" not in answer.text


def test_a_body_over_the_size_limit_is_rejected(http: httpx.Client) -> None:
    answer = http.post("/classify", content=b'{"input": "' + b"x" * 33 * 1024**2 + b'"}')
    assert answer.status_code == 413


def test_the_request_id_is_returned_once_and_is_part_of_the_completion_id(
    http: httpx.Client,
) -> None:
    answer = http.post(
        "/v1/completions",
        json={"model": MODEL, "prompt": "a", "max_tokens": 1},
        headers={"x-request-id": "my-request-7"},
    )
    assert answer.headers.get_list("x-request-id") == ["my-request-7"]
    assert "my-request-7" in answer.json()["id"]
    assert len(http.get("/health").headers.get_list("x-request-id")) == 1


def test_a_disconnect_aborts_the_request_in_the_engine(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1900, "stream": True, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()  # the end of the iterator closes the stream
        next(lines)
        wait_for_running(http, 1)
    wait_for_running(http, 0)


def wait_for_running(http: httpx.Client, expected: int) -> None:
    deadline = time.monotonic() + 30  # the stream above takes longer
    while (ready := http.get("/ready").json())["pools"][MODEL]["running"] != expected:
        assert time.monotonic() < deadline, f"{expected} expected: {ready['pools'][MODEL]}"
        time.sleep(0.05)


def test_concurrent_requests_share_the_engine(client: openai.OpenAI) -> None:
    def ask(number: int) -> int:
        answer = client.completions.create(
            model=MODEL,
            prompt=f"Number {number}",
            max_tokens=16,
            extra_body={"ignore_eos": True},
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        assert list(threads.map(ask, range(32))) == [16] * 32


def test_vllms_metrics_are_exported_by_rays_agents(
    cluster: RunningCluster, client: openai.OpenAI
) -> None:
    url = f"{cluster.dashboard_url}/api/prometheus/sd"
    groups = httpx.get(url, timeout=60).json()
    targets = [target for group in groups for target in group["targets"]]
    # Ray exports a counter only after its first event, and nothing is preempted here.
    wanted = VLLM.keys() - {"ray_vllm_num_preemptions_total"}
    found: set[str] = set()
    deadline = time.monotonic() + 120
    # Ray drops gauges of an idle engine, so keep it busy.
    while not wanted <= found and time.monotonic() < deadline:
        client.chat.completions.create(model=MODEL, messages=PARIS, max_tokens=32)
        for target in targets:
            # test_monitoring checks that all respond.
            with contextlib.suppress(httpx.TransportError):
                page = httpx.get(f"http://{target}/metrics", timeout=30).text
                found |= set(re.findall(r"^(ray_vllm_\w+)", page, re.MULTILINE))
    assert sorted(wanted - found) == []
