"""OpenAI's responses endpoint, as vLLM serves it for plain text."""

from typing import TYPE_CHECKING, Any

from cluster.engines.sim import wire
from cluster.engines.sim.generation import Generation, SimSequence
from cluster.engines.sim.http import HttpExchange
from cluster.engines.sim.openai import collect_texts
from cluster.engines.sim.parse import Message, ResponsesBody, parse_body
from cluster.engines.sim.prompts import chat_prompt, check_model, token_limit

if TYPE_CHECKING:
    from cluster.engines.sim.engine import SimEngine


async def create(engine: "SimEngine", exchange: HttpExchange) -> None:
    body = parse_body(ResponsesBody, exchange.body, exchange.content_type)
    check_model(engine, exchange, body.model)
    turns = body.input
    if isinstance(turns, str):
        turns = [Message(role="user", content=turns)]
    if body.instructions:
        turns = [Message(role="system", content=body.instructions), *turns]
    prompt = chat_prompt(turns)
    limit = token_limit(engine, prompt, body.max_output_tokens)
    base = _response(engine, exchange, body, limit)
    item_id = f"msg_{exchange.item_id()}"
    with engine.generating([prompt], [limit], [], exchange) as generation:
        if body.stream:
            await _stream(exchange, generation, base, item_id)
            return
        (text,) = await collect_texts(generation)
    (sequence,) = generation.sequences
    await exchange.reply(200, base | _result(sequence, _item(item_id, [_part(text)])))


def _response(
    engine: "SimEngine", exchange: HttpExchange, body: ResponsesBody, limit: int
) -> dict[str, Any]:
    return {
        "id": body.request_id or exchange.new_id("resp_"),
        "created_at": int(exchange.created_s),
        "incomplete_details": None,
        "instructions": body.instructions,
        "metadata": None,
        "model": exchange.model,
        "object": "response",
        "output": [],
        "parallel_tool_calls": True,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "tool_choice": "none",
        "tools": [],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "background": False,
        "max_output_tokens": limit,
        "max_tool_calls": None,
        "previous_response_id": None,
        "prompt": None,
        "reasoning": None,
        "service_tier": "auto",
        "status": "in_progress",
        "text": None,
        "top_logprobs": None,
        "truncation": "disabled",
        "usage": None,
        "user": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "input_messages": None,
        "output_messages": None,
    }


def _result(sequence: SimSequence, item: dict[str, Any]) -> dict[str, Any]:
    request = sequence.request
    cut = request.finish_reason == "length"
    input_details = {"cached_tokens": 0, "cache_write_tokens": 0}
    input_details |= {"input_tokens_per_turn": [], "cached_tokens_per_turn": []}  # type: ignore[dict-item]
    output_details = {"reasoning_tokens": 0, "tool_output_tokens": 0}
    output_details |= {"output_tokens_per_turn": [], "tool_output_tokens_per_turn": []}  # type: ignore[dict-item]
    usage = {
        "input_tokens": request.num_prompt,
        "input_tokens_details": input_details,
        "output_tokens": request.num_generated,
        "output_tokens_details": output_details,
        "total_tokens": len(request.tokens),
    }
    return {
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": [item],
        "status": "incomplete" if cut else "completed",
        "usage": usage,
    }


def _part(text: str, logprobs: list[Any] | None = None) -> dict[str, Any]:
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": logprobs}


def _item(id_: str, content: list[Any], status: str = "completed") -> dict[str, Any]:
    item = {"id": id_, "content": content, "role": "assistant", "status": status}
    return item | {"type": "message", "phase": None}


async def _stream(
    exchange: HttpExchange, generation: Generation, base: dict[str, Any], item_id: str
) -> None:
    (sequence,) = generation.sequences
    number = 0

    async def emit(kind: str, **fields: Any) -> None:
        nonlocal number
        name = f"response.{kind}"
        body = {**fields, "sequence_number": number, "type": name}
        await exchange.write(wire.event(dict(sorted(body.items())), name))
        number += 1

    at_item = {"item_id": item_id, "output_index": 0}
    at_part = {"content_index": 0, **at_item}
    await exchange.start_stream()
    await emit("created", response=base)
    await emit("in_progress", response=base)
    await generation.wait_for_tokens()
    await emit("output_item.added", item=_item(item_id, [], "in_progress"), output_index=0)
    await emit("content_part.added", **at_part, part=_part("", []))
    texts: list[str] = []
    async for deltas in generation.batches():
        for _, text, _ in deltas:
            texts.append(text)
            await emit("output_text.delta", **at_part, delta=text, logprobs=[])
    part = _part("".join(texts))
    item = _item(item_id, [part])
    await emit("output_text.done", **at_part, text=part["text"], logprobs=[])
    await emit("content_part.done", **at_part, part=part)
    await emit("output_item.done", item=item, output_index=0)
    await emit("completed", response=base | _result(sequence, item))
    await exchange.end_stream()
