"""Prompts and token limits of validated request bodies."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.engines.sim import tokenizer
from cluster.engines.sim.http import HttpExchange
from cluster.engines.sim.parse import (
    ApiError,
    ChatBody,
    CompletionBody,
    Message,
    value_error,
)

if TYPE_CHECKING:
    from cluster.engines.sim.engine import SimEngine


def check_model(engine: "SimEngine", exchange: HttpExchange, model: str | None) -> None:
    name = engine.config.name
    if model and model not in engine.config.model_names:
        message = f"The model `{model}` does not exist. Valid aliases: {name}."
        raise ApiError(message, "model", status=404, type_="NotFoundError")
    exchange.model = model if model in engine.config.adapters else name


def check_sampling(body: ChatBody | CompletionBody) -> None:
    """Raise ``ApiError`` for sampling parameters that are invalid in vLLM or not simulated."""
    if body.stream_options is not None and not body.stream:
        message = "Stream options can only be defined when `stream=True`."
        raise value_error(message, "stream_options")
    n = 1 if body.n is None else body.n
    if n < 1:
        raise ApiError(f"n must be at least 1, got {n}.")
    if n > 1:
        raise value_error("The simulated engine supports n=1 only.", "n", n)
    if body.temperature is not None and body.temperature < 0:
        message = f"temperature must be non-negative, got {body.temperature}."
        raise value_error(message, "temperature", body.temperature)


def chat_prompt(messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
    if not messages:
        raise ApiError(
            "Cannot apply chat template to an empty conversation. Provide at least one message."
        )
    turns = [(message.role, message.text()) for message in messages]
    return tokenizer.encode_chat(turns, add_generation_prompt)


def completion_prompts(body: CompletionBody) -> list[list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [tokenizer.encode(prompt)]
    if not prompt:
        raise ApiError("You must pass at least one prompt")
    if isinstance(prompt[0], int):
        return [[int(token) for token in prompt]]
    return [tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompt]


def token_limit(
    engine: "SimEngine", prompt: list[int], wanted: int | None, param: str = "max_tokens"
) -> int:
    """Return the number of tokens to generate: ``wanted``, or the rest of the context.

    Raises:
        ApiError: The prompt or ``wanted`` is too long, or nothing can be generated.
    """
    limit = engine.max_model_len
    if wanted is not None and wanted > limit:
        message = (
            f"{param}={wanted} cannot be greater than max_model_len={limit}. "
            "Please request fewer output tokens."
        )
        raise value_error(message, param, wanted)
    if len(prompt) > limit:
        message = (
            f"This model's maximum context length is {limit} tokens. However, your prompt contains "
            f"at least {limit + 1} input tokens, which exceeds this limit even without any output "
            "tokens. Please reduce the length of the input prompt."
        )
        raise value_error(message, "input_tokens", limit + 1)
    room = limit - len(prompt)
    allowed = room if wanted is None else min(wanted, room)
    if allowed < 1:
        message = f"max_tokens must be at least 1, got {allowed}."
        raise value_error(message, "max_tokens", allowed)
    return allowed
