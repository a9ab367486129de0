"""All non-public names of vLLM that Tandem uses exist; after an upgrade, failures name the missing.

Imports vLLM, which takes 15 seconds.
"""

import importlib
from typing import Any

import msgspec
import numpy as np
import pytest

from cluster.engines.prefix_cache import PrefixTracker
from cluster.engines.vllm import internals
from cluster.engines.vllm.kv_events import KvEventReader
from cluster.engines.vllm.parser_choice import REASONING_PARSERS, TOOL_PARSERS, Row
from cluster.gateway.messages import Request
from cluster.gateway.pools.forwarding import request_head
from cluster.routing import Fingerprint

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("name", internals.NAMES)
def test_name_exists(name: str) -> None:
    assert getattr(internals, name) is not None


@pytest.mark.parametrize("name", internals.ATTRIBUTES)
def test_attributes_exist(name: str) -> None:
    cls = getattr(internals, name)
    missing = [attribute for attribute in internals.ATTRIBUTES[name] if not defines(cls, attribute)]
    assert not missing


def defines(named: Any, attribute: str) -> bool:
    """Return True if a class, or that of an object, has or declares an attribute.

    ``__init__`` may also set it.
    """
    cls = named if isinstance(named, type) else type(named)
    return any(
        attribute in vars(base)
        or attribute in getattr(base, "__annotations__", {})
        or attribute
        in getattr(vars(base).get("__init__"), "__code__", compile("", "", "exec")).co_names
        for base in cls.__mro__
    )


@pytest.mark.parametrize("module", internals.ENGINE_MODULES)
def test_module_that_is_imported_early_exists(module: str) -> None:
    importlib.import_module(module)


@pytest.mark.parametrize("row", TOOL_PARSERS, ids=lambda row: row.parser)
def test_tool_parser_exists(row: Row) -> None:
    assert row.parser in internals.ToolParserManager.list_registered()


@pytest.mark.parametrize("row", REASONING_PARSERS, ids=lambda row: row.parser)
def test_reasoning_parser_exists(row: Row) -> None:
    assert row.parser in internals.ReasoningParserManager.list_registered()


def test_members_of_modules_exist() -> None:
    import torch

    internals.CPUWorker  # noqa: B018  # registers the kernels
    for op in ("rms_norm", "fused_add_rms_norm"):
        assert hasattr(internals.ir.ops, op)
        assert hasattr(torch.ops._C, op)
    assert internals.envs.VLLM_LOG_STATS_INTERVAL > 0
    assert callable(internals.current_platform.is_cpu)


def test_vllm_obeys_the_priority_that_the_router_sets() -> None:
    from starlette.requests import Request as HttpRequest
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    client = Request("id", "POST", "/", b"", [(b"x-vllm-priority", b"-99")], b'{"messages": []}')
    head = request_head(client, 2)
    received = HttpRequest({"type": "http", "headers": [(k, v) for k, v in head.headers]})
    body = ChatCompletionRequest.model_validate({"messages": [], "priority": -99})
    assert GenerateBaseServing._get_priority(body, received) == -2


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        internals.no_such_name  # noqa: B018


def test_events_encoded_by_vllm_are_decoded() -> None:
    tracker = PrefixTracker(4, lambda ids: np.full(len(ids), 4))
    reader = KvEventReader(tracker, "inproc://unused")
    ids = list(range(8))
    tracker.add_prompt(Fingerprint((1, 2), (16, 32), 32), ids)
    stored = internals.BlockStored(
        block_hashes=[b"a", b"b"],
        parent_block_hash=None,
        token_ids=ids,
        block_size=4,
        lora_id=None,
        medium="GPU",
        lora_name=None,
    )

    def encode(event: Any) -> bytes:
        return msgspec.msgpack.encode(internals.EventBatch(ts=1.5, events=[event]))

    reader.apply_batch(0, encode(stored))
    assert set(tracker.snapshot()) == {1, 2}
    reader.apply_batch(1, encode(internals.BlockRemoved(block_hashes=[b"b"], medium="GPU")))
    assert set(tracker.snapshot()) == {1}
    reader.apply_batch(2, encode(internals.AllBlocksCleared()))
    assert not tracker.snapshot()
