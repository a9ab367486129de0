"""The tables of request fields in ``docs/reference/api.md``: complete, and true in a cluster."""

import pkgutil
import re
import typing
from typing import Any, NamedTuple

import httpx
import pytest
from anthropic.types import message_create_params
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from tests.cluster.conftest import ROOT, RunningCluster

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's imports warn

PAGE = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
CHAT = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


class Api(NamedTuple):
    """A vendor's endpoint."""

    heading: str
    path: str
    vendor: Any
    """Type of the vendor's parameters."""
    vllm: str
    """vLLM's type of the body, below ``vllm.entrypoints``."""
    body: dict[str, Any]


APIS = [
    Api(
        "OpenAI: chat completions",
        "/v1/chat/completions",
        chat_create_params.CompletionCreateParamsStreaming,
        "openai.chat_completion.protocol:ChatCompletionRequest",
        CHAT,
    ),
    Api(
        "OpenAI: completions",
        "/v1/completions",
        completion_create_params.CompletionCreateParamsStreaming,
        "openai.completion.protocol:CompletionRequest",
        {"model": "smollm2", "prompt": "Hi", "max_tokens": 2},
    ),
    Api(
        "OpenAI: responses",
        "/v1/responses",
        response_create_params.ResponseCreateParamsStreaming,
        "openai.responses.protocol:ResponsesRequest",
        {"model": "smollm2", "input": "Hi", "max_output_tokens": 2},
    ),
    Api(
        "Anthropic: messages",
        "/v1/messages",
        message_create_params.MessageCreateParamsStreaming,
        "anthropic.protocol:AnthropicMessagesRequest",
        CHAT,
    ),
]
VALUES: dict[str, Any] = {
    "background": True,
    "max_tool_calls": 1,
    "metadata": {"user_id": "x"},
    "prompt": {"id": "x"},
    "service_tier": "auto",
    "store": True,
}
"""Values of fields that are typed in vLLM; others are strings here."""
by_api = pytest.mark.parametrize("api", APIS, ids=[api.heading for api in APIS])


def fields_of(api: Api, *treatments: str) -> set[str]:
    """Return the fields of the rows with one of the treatments."""
    section = PAGE.split(f"### {api.heading}\n")[1].split("\n## ")[0].split("\n### ")[0]
    rows = re.findall(r"^\| (\S.*?) \| (.*?) \|$", section, flags=re.MULTILINE)
    fields = [cell.split(":")[0].split(" (")[0] for kind, cell in rows if kind in treatments]
    return {name for cell in fields for name in re.findall(r"`(\w+)`", cell)}


@by_api
def test_the_fields_of_vendor_and_vllm_are_listed(api: Api) -> None:
    vendor = set(typing.get_type_hints(api.vendor))
    vllm = set(pkgutil.resolve_name(f"vllm.entrypoints.{api.vllm}").model_fields)
    assert fields_of(api, "supported", "ignored", "rejected") == vendor
    assert fields_of(api, "vLLM's") == vllm - vendor
    assert fields_of(api, "supported") <= vllm


POOLING = {
    "`/classify`": "pooling.classify.protocol:ClassificationRequest",
    "`/pooling`": "pooling.pooling.protocol:PoolingRequest",
    "`/rerank`, `/v1/rerank`, `/v2/rerank`": "pooling.scoring.protocol:RerankRequest",
    "`/score`, `/v1/score`": "pooling.scoring.protocol:ScoreRequest",
    "`/v1/embeddings`, `/embeddings`": "pooling.embed.protocol:EmbeddingRequest",
}
"""vLLM's type of the body, by the first column of the classifiers' table."""


@pytest.mark.parametrize("paths", POOLING)
def test_the_fields_of_vllms_pooling_api_are_listed(paths: str) -> None:
    rows = dict(re.findall(r"^\| (.*?) \| (.*) \|$", PAGE, flags=re.MULTILINE))
    listed = set(re.findall(r"`(\w+)`", rows["all of the first group"] + rows[paths]))
    kinds = models_of(pkgutil.resolve_name(f"vllm.entrypoints.{POOLING[paths]}"))
    # `data` belongs to models with their own input processors, which classifiers do not have.
    assert {name for kind in kinds for name in kind.model_fields} - {"data"} <= listed


def models_of(kind: Any) -> list[Any]:
    """Return the models of a union, which may be annotated."""
    parts = typing.get_args(kind)
    return [model for part in parts for model in models_of(part)] or [
        *([kind] if hasattr(kind, "model_fields") else [])
    ]


@by_api
def test_ignored_fields_are_accepted_and_rejected_ones_are_named(
    cluster: RunningCluster, api: Api
) -> None:
    def post(names: set[str]) -> httpx.Response:
        extra = {name: VALUES.get(name, "x") for name in names}
        return httpx.post(cluster.http_url + api.path, json={**api.body, **extra}, timeout=60)

    accepted = post(fields_of(api, "ignored"))
    assert accepted.status_code == 200, accepted.text
    for name in fields_of(api, "rejected"):
        refused = post({name})
        assert refused.status_code == 400
        assert name in refused.text
