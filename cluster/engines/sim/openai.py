"""OpenAI's endpoints (models, chat, completions) and vLLM's tokenize and detokenize."""

import time
from typing import TYPE_CHECKING

from cluster.engines.sim import tokenizer, wire
from cluster.engines.sim.chunks import ChatChunks, ChunkWriter, CompletionChunks
from cluster.engines.sim.generation import Generation
from cluster.engines.sim.http import HttpExchange
from cluster.engines.sim.parse import (
    ApiError,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    missing_field,
    parse_body,
)
from cluster.engines.sim.prompts import (
    chat_prompt,
    check_model,
    check_sampling,
    completion_prompts,
    token_limit,
)

if TYPE_CHECKING:
    from cluster.engines.sim.engine import SimEngine


async def models(engine: "SimEngine", exchange: HttpExchange) -> None:
    config = engine.config
    body = wire.models(config, int(time.time()), engine.max_model_len)
    await exchange.reply(200, body)


async def chat(engine: "SimEngine", exchange: HttpExchange) -> None:
    body = parse_body(ChatBody, exchange.body, exchange.content_type)
    check_model(engine, exchange, body.model)
    prompt = chat_prompt(body.messages, body.add_generation_prompt)
    if body.max_completion_tokens is None:
        limit = token_limit(engine, prompt, body.max_tokens)
    else:
        limit = token_limit(engine, prompt, body.max_completion_tokens, "max_completion_tokens")
    check_sampling(body)
    id_, created = exchange.new_id("chatcmpl-"), int(exchange.created_s)
    with engine.generating([prompt], [limit], body.stops(), exchange) as generation:
        if body.stream:
            chunks = ChatChunks(id_, created, exchange.model, body)
            await _stream(exchange, generation, chunks)
            return
        (text,) = await collect_texts(generation)
    (sequence,) = generation.sequences
    request = sequence.request
    ids = request.tokens[request.num_prompt :] if body.return_token_ids else None
    prompt_ids = request.tokens[: request.num_prompt] if body.return_token_ids else None
    choice = wire.chat_choice(text, sequence, ids)
    counts = wire.full_usage(request.num_prompt, request.num_generated)
    await exchange.reply(200, wire.chat(id_, created, exchange.model, choice, counts, prompt_ids))


async def completions(engine: "SimEngine", exchange: HttpExchange) -> None:
    body = parse_body(CompletionBody, exchange.body, exchange.content_type)
    check_model(engine, exchange, body.model)
    prompts = completion_prompts(body)
    limits = [token_limit(engine, prompt, body.max_tokens) for prompt in prompts]
    check_sampling(body)
    if body.echo:
        raise ApiError("The simulated engine does not echo prompts", "echo")
    id_, created = exchange.new_id("cmpl-"), int(exchange.created_s)
    with engine.generating(prompts, limits, body.stops(), exchange) as generation:
        if body.stream:
            chunks = CompletionChunks(id_, created, exchange.model, body)
            await _stream(exchange, generation, chunks)
            return
        texts = await collect_texts(generation)
    pairs = zip(texts, generation.sequences, strict=True)
    choices = [wire.completion_choice(t, s, bool(body.return_token_ids)) for t, s in pairs]
    counts = wire.full_usage(*wire.count_tokens(generation.sequences))
    await exchange.reply(200, wire.completion(id_, created, exchange.model, choices, counts))


async def tokenize(engine: "SimEngine", exchange: HttpExchange) -> None:
    body = parse_body(TokenizeBody, exchange.body, exchange.content_type)
    check_model(engine, exchange, body.model)
    if body.messages is not None:
        ids = chat_prompt(body.messages, body.add_generation_prompt)
    elif body.prompt is not None:
        ids = tokenizer.encode(body.prompt)
    else:
        raise missing_field(body, "prompt", "messages")
    pieces = [tokenizer.piece_of(token) for token in ids] if body.return_token_strs else None
    counts = {"count": len(ids), "max_model_len": engine.max_model_len}
    await exchange.reply(200, counts | {"tokens": ids, "token_strs": pieces})


async def detokenize(engine: "SimEngine", exchange: HttpExchange) -> None:
    """``POST /detokenize``; unknown ids give no text, as in vLLM."""
    body = parse_body(DetokenizeBody, exchange.body, exchange.content_type)
    check_model(engine, exchange, body.model)
    await exchange.reply(200, {"prompt": tokenizer.decode(body.tokens)})


async def _stream(exchange: HttpExchange, generation: Generation, writer: ChunkWriter) -> None:
    started: set[int] = set()
    await generation.wait_for_tokens()  # if that fails, respond with an error instead
    await exchange.start_stream()
    async for deltas in generation.batches():
        for delta in deltas:
            sequence = delta[0]
            if sequence.index not in started:
                started.add(sequence.index)
                if first := writer.first(sequence):
                    await exchange.write(first)
            await exchange.write(writer.token(delta))
    for chunk in writer.end(generation.sequences):
        await exchange.write(chunk)
    await exchange.end_stream()


async def collect_texts(generation: Generation) -> list[str]:
    texts: list[list[str]] = [[] for _ in generation.sequences]
    async for deltas in generation.batches():
        for sequence, text, _ in deltas:
            texts[sequence.index].append(text)
    return ["".join(parts) for parts in texts]
