"""Response bodies as vLLM 0.32 writes them. Pure."""

import json
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from cluster.config import GeneratorConfig
from cluster.engines.sim.generation import SimSequence

FINGERPRINT = "vllm-sim"
DONE = b"data: [DONE]\n\n"
Body = dict[str, Any]


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def event(value: Any, name: str | None = None) -> bytes:
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + dumps(value) + b"\n\n"


def error_event(message: str) -> bytes:
    return b"data: " + json.dumps(error_body(message, 500)).encode() + b"\n\n"


def error_body(message: str, status: int) -> Body:
    kind = "InternalServerError"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def random_id() -> str:
    """Return an id of 16 hexadecimal digits, as vLLM's."""
    return uuid4().hex[:16]


def count_tokens(sequences: Sequence[SimSequence]) -> tuple[int, int]:
    """Return the prompt and completion tokens of all sequences."""
    requests = [sequence.request for sequence in sequences]
    return sum(r.num_prompt for r in requests), sum(r.num_generated for r in requests)


def usage(prompt_tokens: int, completion_tokens: int) -> Body:
    """Return token counts without details."""
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def full_usage(prompt_tokens: int, completion_tokens: int) -> Body:
    """Return token counts of a response that is not streamed, with empty details as by default."""
    details = {"prompt_tokens_details": None, "completion_tokens_details": None}
    return usage(prompt_tokens, completion_tokens) | details


def models(config: GeneratorConfig, created: int, max_model_len: int) -> Body:
    name, adapters = config.name, config.adapters
    names = (name, *config.aliases)
    cards = [_card(each, config.model, created, None, max_model_len) for each in names]
    cards += [_card(each, path, created, name, None) for each, path in adapters.items()]
    return {"object": "list", "data": cards}


def _card(name: str, root: str, created: int, parent: str | None, length: int | None) -> Body:
    permission = {
        "id": f"modelperm-{random_id()}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": root,
        "parent": parent,
        "max_model_len": length,
        "permission": [permission],
    }


def chat(id_: str, created: int, model: str, choice: Body, counts: Body, prompt_ids: Any) -> Body:
    return {
        "id": id_,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": counts,
        "prompt_logprobs": None,
        "prompt_token_ids": prompt_ids,
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def chat_choice(text: str, sequence: SimSequence, token_ids: list[int] | None) -> Body:
    message = {
        "role": "assistant",
        "content": text,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": None,
    }
    return {
        "index": 0,
        "message": message,
        "logprobs": None,
        "finish_reason": sequence.request.finish_reason,
        "stop_reason": sequence.stop_reason,
        "token_ids": token_ids,
        "routed_experts": None,
    }


def completion(id_: str, created: int, model: str, choices: list[Body], counts: Body) -> Body:
    return {
        "id": id_,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": counts,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def completion_choice(text: str, sequence: SimSequence, with_ids: bool) -> Body:
    request = sequence.request
    prompt, generated = request.tokens[: request.num_prompt], request.tokens[request.num_prompt :]
    return {
        "index": sequence.index,
        "text": text,
        "logprobs": None,
        "finish_reason": request.finish_reason,
        "stop_reason": sequence.stop_reason,
        "token_ids": generated if with_ids else None,
        "prompt_logprobs": None,
        "prompt_token_ids": prompt if with_ids else None,
        "routed_experts": None,
    }
