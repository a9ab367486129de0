"""From a checked body to prompts that fit: token ids and the number of tokens to generate."""

from collections.abc import Sequence

from cluster.engines.sim import tokenizer
from cluster.engines.sim.http import Exchange, Host
from cluster.engines.sim.parse import (
    ChatBody,
    CompletionBody,
    Message,
    Refusal,
    refuse_value,
)


def check_model(host: Host, exchange: Exchange, model: str | None) -> None:
    """Refuse what is neither the model nor an adapter of it; none named is the model."""
    name = host.config.name
    if model and model != name and model not in host.config.adapters:
        message = f"The model `{model}` does not exist. Valid aliases: {name}."
        raise Refusal(message, "model", status=404, type_="NotFoundError")
    exchange.model = model or name


def check_sampling(body: ChatBody | CompletionBody) -> None:
    """Refuse what vLLM's sampling parameters refuse, and what is not simulated."""
    if body.stream_options is not None and not body.stream:
        message = "Stream options can only be defined when `stream=True`."
        raise refuse_value(message, "stream_options")
    n = 1 if body.n is None else body.n
    if n < 1:
        raise Refusal(f"n must be at least 1, got {n}.")
    if n > 1:
        raise refuse_value("The simulated engine gives one choice.", "n", n)
    if body.temperature is not None and body.temperature < 0:
        message = f"temperature must be non-negative, got {body.temperature}."
        raise refuse_value(message, "temperature", body.temperature)


def chat_prompt(messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
    """The ids of a conversation."""
    if not messages:
        raise Refusal(
            "Cannot apply chat template to an empty conversation. Provide at least one message."
        )
    turns = [(message.role, message.text()) for message in messages]
    return tokenizer.encode_chat(turns, add_generation_prompt)


def completion_prompts(body: CompletionBody) -> list[list[int]]:
    """The ids of each prompt of a completion."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [tokenizer.encode(prompt)]
    if not prompt:
        raise Refusal("You must pass at least one prompt")
    if isinstance(prompt[0], int):
        return [[int(token) for token in prompt]]
    return [tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompt]


def fit(host: Host, prompt: list[int], wanted: int | None, param: str = "max_tokens") -> int:
    """How many tokens to generate after ``prompt``: ``wanted``, or all that the context holds.

    Raises:
        Refusal: as vLLM, where the prompt or ``wanted`` is too long, or nothing can be generated.
    """
    limit = host.max_model_len
    if wanted is not None and wanted > limit:
        message = (
            f"{param}={wanted} cannot be greater than max_model_len={limit}. "
            "Please request fewer output tokens."
        )
        raise refuse_value(message, param, wanted)
    if len(prompt) > limit:
        message = (
            f"This model's maximum context length is {limit} tokens. However, your prompt contains "
            f"at least {limit + 1} input tokens, which exceeds this limit even without any output "
            "tokens. Please reduce the length of the input prompt."
        )
        raise refuse_value(message, "input_tokens", limit + 1)
    room = limit - len(prompt)
    granted = room if wanted is None else min(wanted, room)
    if granted < 1:
        message = f"max_tokens must be at least 1, got {granted}."
        raise refuse_value(message, "max_tokens", granted)
    return granted
