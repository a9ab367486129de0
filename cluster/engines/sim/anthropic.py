"""Anthropic's messages endpoints, as vLLM serves them."""

from typing import TYPE_CHECKING, Any

from cluster.engines.sim import wire
from cluster.engines.sim.generation import Generation, SimSequence
from cluster.engines.sim.http import HttpExchange
from cluster.engines.sim.openai import collect_texts
from cluster.engines.sim.parse import (
    ApiError,
    CountTokensBody,
    Message,
    MessagesBody,
    parse_body,
)
from cluster.engines.sim.prompts import chat_prompt, check_model, token_limit

if TYPE_CHECKING:
    from cluster.engines.sim.engine import SimEngine


class AnthropicError(ApiError):
    """An error in Anthropic's shape."""

    def body(self) -> dict[str, Any]:
        return {"type": "error", "error": {"type": self.type, "message": self.message}}


async def messages(engine: "SimEngine", exchange: HttpExchange) -> None:
    body = parse_body(MessagesBody, exchange.body, exchange.content_type)
    prompt = _prompt(engine, exchange, body)
    try:
        limit = token_limit(engine, prompt, body.max_tokens, "max_completion_tokens")
    except ApiError as error:
        raise _in_anthropic_shape(error) from None
    with engine.generating([prompt], [limit], body.stop_sequences or [], exchange) as generation:
        if body.stream:
            await _stream(exchange, generation)
            return
        (text,) = await collect_texts(generation)
    (sequence,) = generation.sequences
    response = _message(exchange.new_id("chatcmpl-"), exchange.model)
    response["content"] = [{"type": "text", "text": text}]
    response |= _end_fields(sequence) | {"usage": _usage(sequence)}
    await exchange.reply(200, response)


async def count_tokens(engine: "SimEngine", exchange: HttpExchange) -> None:
    body = parse_body(CountTokensBody, exchange.body, exchange.content_type)
    count = len(_prompt(engine, exchange, body))
    context = {"original_input_tokens": count}
    await exchange.reply(200, {"input_tokens": count, "context_management": context})


def _prompt(
    engine: "SimEngine", exchange: HttpExchange, body: MessagesBody | CountTokensBody
) -> list[int]:
    turns = list(body.messages)
    if body.system:
        turns.insert(0, Message(role="system", content=body.system))
    try:
        check_model(engine, exchange, body.model)
        return chat_prompt(turns)
    except ApiError as error:
        raise _in_anthropic_shape(error) from None


def _in_anthropic_shape(error: ApiError) -> AnthropicError:
    return AnthropicError(error.message, error.param, status=error.status, type_=error.type)


def _message(id_: str, model: str) -> dict[str, Any]:
    return {"id": id_, "type": "message", "role": "assistant", "content": [], "model": model}


def _usage(sequence: SimSequence, generated: int | None = None) -> dict[str, int]:
    request = sequence.request
    output = request.num_generated if generated is None else generated
    return {"input_tokens": request.num_prompt, "output_tokens": output}


def _end_fields(sequence: SimSequence) -> dict[str, Any]:
    if sequence.stop_reason is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": sequence.stop_reason}
    return {"stop_reason": "max_tokens", "stop_sequence": None}


async def _stream(exchange: HttpExchange, generation: Generation) -> None:
    (sequence,) = generation.sequences

    async def emit(name: str, **fields: Any) -> None:
        await exchange.write(wire.event({"type": name, **fields}, name))

    await generation.wait_for_tokens()  # if that fails, respond with an error instead
    await exchange.start_stream()
    opening = _message(exchange.new_id("chatcmpl-"), exchange.model)
    opening |= {"stop_reason": None, "stop_sequence": None, "usage": _usage(sequence, 0)}
    await emit("message_start", message=opening)
    block = {"type": "text", "text": ""}
    await emit("content_block_start", content_block=block, index=0)
    async for deltas in generation.batches():
        for _, text, _ in deltas:
            delta = {"type": "text_delta", "text": text}
            await emit("content_block_delta", delta=delta, index=0)
    await emit("content_block_stop", index=0)
    await emit("message_delta", delta=_end_fields(sequence), usage=_usage(sequence))
    await emit("message_stop")
    await exchange.end_stream()
