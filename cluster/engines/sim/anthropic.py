"""Anthropic's messages, as vLLM answers them."""

from typing import Any

from cluster.engines.sim import wire
from cluster.engines.sim.generation import Generation, SimSequence
from cluster.engines.sim.http import Exchange, Host
from cluster.engines.sim.openai import collect
from cluster.engines.sim.parse import (
    CountTokensBody,
    Message,
    MessagesBody,
    Refusal,
    parse_body,
)
from cluster.engines.sim.prompts import chat_prompt, check_model, fit


class AnthropicRefusal(Refusal):
    """An error in Anthropic's shape."""

    def body(self) -> dict[str, Any]:
        """The answer's body."""
        return {"type": "error", "error": {"type": self.type, "message": self.message}}


async def messages(host: Host, exchange: Exchange) -> None:
    """``POST /v1/messages``."""
    body = parse_body(MessagesBody, exchange.body, exchange.content_type)
    prompt = _prompt(host, exchange, body)
    try:
        limit = fit(host, prompt, body.max_tokens, "max_completion_tokens")
    except Refusal as refusal:
        raise _restyled(refusal) from None
    generation = host.submit([prompt], [limit], body.stop_sequences or [], exchange)
    try:
        if body.stream:
            await _stream(host, exchange, generation)
            return
        (text,) = await collect(generation)
    finally:
        host.discard(generation)
    (sequence,) = generation.sequences
    answer = _message(exchange.new_id("chatcmpl-"), exchange.model)
    answer["content"] = [{"type": "text", "text": text}]
    answer |= _ending(sequence) | {"usage": _usage(sequence)}
    await exchange.reply(200, answer)


async def count_tokens(host: Host, exchange: Exchange) -> None:
    """``POST /v1/messages/count_tokens``."""
    body = parse_body(CountTokensBody, exchange.body, exchange.content_type)
    count = len(_prompt(host, exchange, body))
    context = {"original_input_tokens": count}
    await exchange.reply(200, {"input_tokens": count, "context_management": context})


def _prompt(host: Host, exchange: Exchange, body: MessagesBody | CountTokensBody) -> list[int]:
    turns = list(body.messages)
    if body.system:
        turns.insert(0, Message(role="system", content=body.system))
    try:
        check_model(host, exchange, body.model)
        return chat_prompt(turns)
    except Refusal as refusal:
        raise _restyled(refusal) from None


def _restyled(refusal: Refusal) -> AnthropicRefusal:
    return AnthropicRefusal(
        refusal.message, refusal.param, status=refusal.status, type_=refusal.type
    )


def _message(id_: str, model: str) -> dict[str, Any]:
    return {"id": id_, "type": "message", "role": "assistant", "content": [], "model": model}


def _usage(sequence: SimSequence, generated: int | None = None) -> dict[str, int]:
    request = sequence.request
    output = request.num_generated if generated is None else generated
    return {"input_tokens": request.num_prompt, "output_tokens": output}


def _ending(sequence: SimSequence) -> dict[str, Any]:
    if sequence.stop_reason is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": sequence.stop_reason}
    return {"stop_reason": "max_tokens"}


async def _stream(host: Host, exchange: Exchange, generation: Generation) -> None:
    (sequence,) = generation.sequences

    async def emit(name: str, **fields: Any) -> None:
        await exchange.write(wire.event({"type": name, **fields}, name))

    deltas = await generation.take()
    await exchange.begin_stream()
    opening = _message(exchange.new_id("chatcmpl-"), exchange.model)
    opening |= {"stop_reason": None, "stop_sequence": None, "usage": _usage(sequence, 0)}
    await emit("message_start", message=opening)
    block = {"type": "text", "text": ""}
    await emit("content_block_start", content_block=block, index=0)
    ended = False
    while True:
        for _, text, last in deltas:
            delta = {"type": "text_delta", "text": text}
            await emit("content_block_delta", delta=delta, index=0)
            ended = last
        if ended:
            break
        deltas = await generation.take()
    await emit("content_block_stop", index=0)
    ending = {"stop_sequence": None} | _ending(sequence)
    delta = {"stop_reason": ending["stop_reason"], "stop_sequence": ending["stop_sequence"]}
    await emit("message_delta", delta=delta, usage=_usage(sequence))
    await emit("message_stop")
    await exchange.end_stream()
