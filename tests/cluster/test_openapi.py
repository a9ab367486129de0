"""Generated requests to a real cluster: each answer is as ``/openapi.json`` describes it.

The cluster is the same afterwards: it gives the same answers, no process has died, and none has
grown. ``TANDEM_OPENAPI_CASES`` sets the number of requests per operation and kind, valid or not;
``pytest -s`` prints how many were sent.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import hypothesis
import psutil
import pytest
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks
from schemathesis.core.errors import UnsupportedSchema
from schemathesis.core.failures import FailureGroup

from benchmarks.processes import ProcessMemory, find_processes
from tests.cluster.conftest import RunningCluster, wait_until
from tests.cluster.engine_processes import engines_of_cluster

pytestmark = [pytest.mark.timeout(7200), pytest.mark.filterwarnings("default")]

CASES = int(os.environ.get("TANDEM_OPENAPI_CASES", "3"))
MODEL, CLASSIFIER = "smollm2", "sentiment"
TIMEOUT_S = 180
"""Longest time for an answer, of which a stalled machine needs a part."""
MAX_TOKENS = 4
"""Longest completion; the model generates about 40 tokens per second in CI."""
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": MAX_TOKENS}
SHORT = {"max_tokens": MAX_TOKENS}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1]}},
    "required": ["a"],
    "additionalProperties": False,
}
SEEDS: dict[str, dict[str, Any]] = {
    "/": {"inputs": "I loved it."},
    "/classify": {"input": ["I loved it.", "Boring."]},
    "/detokenize": {"model": MODEL, "tokens": [1, 2, 3]},
    "/embed": {"inputs": "Hello"},
    "/embed_all": {"inputs": "Hello"},
    "/generative_scoring": {"model": MODEL, "query": "A", "items": ["B"], "label_token_ids": [5]},
    "/pooling": {"input": "Hello"},
    "/predict": {"inputs": "I loved it."},
    "/similarity": {"inputs": {"source_sentence": "Hello", "sentences": ["Hi"]}},
    "/tokenize": {"model": MODEL, "prompt": "Hello"},
    "/v1/chat/completions": CHAT,
    "/v1/chat/completions/batch": {**CHAT, "messages": [CHAT["messages"], CHAT["messages"]]},
    "/v1/tasks/answer": {"question": "Hi?", "documents": [{"text": "Hi"}], **SHORT},
    "/v1/tasks/classify": {"texts": ["Hi"], "labels": ["greeting", "other"]},
    "/v1/tasks/extract": {"text": "Hi", "json_schema": SCHEMA, "max_tokens": 16},
    "/v1/tasks/sentiment": {"texts": ["I loved it."]},
    "/v1/tasks/summarize": {"text": "Hi", **SHORT},
    "/v1/tasks/translate": {"text": "Hi", "source": "en", "target": "de", **SHORT},
    "/v1/knowledge": {"name": "openapi"},
    "/v1/completions": {"model": MODEL, "prompt": "Hello", "max_tokens": MAX_TOKENS},
    "/v1/embeddings": {"model": CLASSIFIER, "input": "Hello"},
    "/v1/messages": CHAT,
    "/v1/messages/count_tokens": CHAT,
    "/v1/responses": {"model": MODEL, "input": "Hi", "max_output_tokens": MAX_TOKENS},
}
"""A valid body per path. Half of the cases add generated fields to it."""
LIMITS = {"max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "n", "best_of"}
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
SETTINGS = hypothesis.settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[hypothesis.Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(hypothesis.HealthCheck),
)


ROLES = ("router", "engine", "classifier")
GROWTH_MB = 60.0 + 0.02 * 40 * CASES
"""Largest growth of a process: caches of grammars, tokenizers and prompts fill, and each of about
40 cases per operation and kind may leave 20 KB, far less than a leaked request with its body."""
KV_CACHE_MB = 540.0
"""The engine's cache (``kv_cache_memory_bytes``), whose pages count once they are written to."""
MORE_DESCRIPTORS = 16
"""Connections that are kept alive."""
NUM_SENT: Counter[str] = Counter()
"""Generated requests by kind of answer, such as 4xx."""
CUT_SHORT: list[str] = []
"""Operations with a schema that schemathesis cannot negate, which it notices while it draws."""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner),
    max_leaves=12,
)


@dataclass(frozen=True)
class State:
    """Answers and processes, which generated requests must not change."""

    answers: list[str]
    processes: dict[psutil.Process, tuple[float, int]]
    """Private memory in MB and the number of descriptors, by process."""


def read_state(cluster: RunningCluster) -> State:
    answers = []
    with httpx.Client(base_url=cluster.http_url, timeout=60) as http:
        wait_until(lambda: is_idle(http), 120, "the end of all requests")
        prompt = {"model": MODEL, "prompt": "The capital of France", "temperature": 0}
        for _ in range(2):  # the second answer uses cached blocks, in both states
            completion = http.post("/v1/completions", json={**prompt, "max_tokens": 32}).json()
            labels = http.post("/classify", json=SEEDS["/classify"]).json()["data"]
            answers = [completion["choices"][0]["text"], *(one["label"] for one in labels)]
    pids = [pid for role in ROLES for pid in find_processes(cluster.home, role)]
    processes = {*map(psutil.Process, pids), *engines_of_cluster(cluster.home)}
    used = {one: (ProcessMemory.read(one.pid).pss_mb, one.num_fds()) for one in processes}
    return State(answers, used)


def is_idle(http: httpx.Client) -> bool:
    pools = http.get("/ready").json()["pools"].values()
    return not any(pool["running"] or pool["in_flight"] or pool["queued"] for pool in pools)


@pytest.fixture(scope="module", autouse=True)
def unharmed(cluster: RunningCluster) -> Iterator[None]:
    """Compare the cluster before and after the tests of this module."""
    before = read_state(cluster)
    yield
    print(f"\n{NUM_SENT.total()} generated requests were sent; answers: {dict(NUM_SENT)}")
    print(f"operations with fewer: {CUT_SHORT}")
    after = read_state(cluster)
    assert after.answers == before.answers
    assert after.processes.keys() == before.processes.keys()
    engines = engines_of_cluster(cluster.home)
    for process, (size_mb, descriptors) in after.processes.items():
        old_mb, old_descriptors = before.processes[process]
        growth_mb = GROWTH_MB + (KV_CACHE_MB if process in engines else 0.0)
        assert size_mb - old_mb < growth_mb, process.cmdline()
        assert descriptors - old_descriptors < MORE_DESCRIPTORS, process.cmdline()


@pytest.fixture(scope="module")
def schema(cluster: RunningCluster) -> Any:
    return schemathesis.openapi.from_url(f"{cluster.http_url}/openapi.json")


@pytest.mark.parametrize("path", SEEDS)
def test_answers_to_valid_requests_are_as_documented(schema: Any, path: str) -> None:
    operation = schema[path]["POST"]
    streams = "text/event-stream" in str(operation.definition.raw["responses"]["200"])
    for body in (SEEDS[path], *([{**SEEDS[path], "stream": True}] if streams else [])):
        headers = {"x-tandem-usage": "1"}  # adds an event to streams
        case = operation.Case(body=body, headers=headers, media_type="application/json")
        answer = case.call_and_validate(checks=CHECKS, timeout=TIMEOUT_S)
        assert answer.status_code == 200


def test_answers_to_generated_requests_are_as_documented(schema: Any) -> None:
    schema.validate()
    failures: list[str] = []
    with requests.Session() as session:
        for operation in (result.ok() for result in schema.get_all_operations()):
            for mode in GenerationMode:
                try:
                    check_operation(operation, mode, session)
                except UnsupportedSchema:
                    CUT_SHORT.append(f"{operation.label} ({mode.value})")
                except (FailureGroup, requests.RequestException) as failure:
                    failures.append(f"{operation.label}: {failure!r}")
    assert not failures, "\n\n".join(failures)


@pytest.mark.parametrize("path", SEEDS)
def test_arbitrary_fields_cause_no_server_error(cluster: RunningCluster, path: str) -> None:
    """Replace or add fields of a valid body by arbitrary JSON."""
    names = st.sampled_from([*SEEDS[path], "stream", "tools", "extra_body"]) | st.text(max_size=9)

    @SETTINGS
    @hypothesis.given(st.dictionaries(names, JSON, min_size=1, max_size=3))
    def check(fields: dict[str, Any]) -> None:
        body = cheap({**SEEDS[path], **fields}, SEEDS[path], has_seed=False)
        content = json.dumps(body)
        headers = {"content-type": "application/json"}
        answer = http.post(path, content=content.encode(errors="replace"), headers=headers)
        NUM_SENT[f"{answer.status_code // 100}xx"] += 1
        assert answer.status_code < 500, f"{content}: {answer.text[:300]}"
        assert answer.is_success or "error" in answer.json(), f"{content}: {answer.text[:300]}"

    with httpx.Client(base_url=cluster.http_url, timeout=TIMEOUT_S) as http:
        check()


def check_operation(operation: Any, mode: GenerationMode, session: requests.Session) -> None:
    """Send requests that conform to the document, or do not, and check the answers."""

    @SETTINGS
    @hypothesis.given(operation.as_strategy(generation_mode=mode), st.booleans())
    def check(case: Any, has_seed: bool) -> None:
        if isinstance(case.body, dict):
            case.body = cheap(case.body, SEEDS.get(operation.path, {}), has_seed)
        if has_seed:  # most generated keys are equal, and a used one is a 422
            (case.headers or {}).pop("idempotency-key", None)
        (case.headers or {}).pop("host", None)  # HAProxy answers invalid ones in HTML
        if has_seed and "model" in case.path_parameters:
            case.path_parameters["model"] = MODEL
        answer = case.call(session=session, timeout=TIMEOUT_S)
        NUM_SENT[f"{answer.status_code // 100}xx"] += 1
        case.validate_response(answer, checks=CHECKS)

    check()


def cheap(body: dict[str, Any], seed: dict[str, Any], has_seed: bool) -> dict[str, Any]:
    """Return a body that takes the model little time, with the fields of ``seed`` if wanted."""
    few = {name: min(value, MAX_TOKENS) for name, value in body.items() if is_limit(name, value)}
    needed = {
        name: value
        for name, value in seed.items()
        if has_seed or name == "model" or (name in LIMITS and body.get(name) is None)
    }
    return {**body, **few, **needed}


def is_limit(name: str, value: Any) -> bool:
    return name in LIMITS and isinstance(value, int | float)
