"""Tool calls of the small model in a live cluster, with the vendors' clients."""

import json
from typing import Any

import anthropic
import openai
import pytest

MODEL = "smollm2"
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER: Any = {"name": "weather", "description": "Tell the weather", "parameters": SCHEMA}
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
CHOICES = {"required": "required", "named": {"type": "function", "function": {"name": "weather"}}}


def ask(client: openai.OpenAI, choice: Any, **fields: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=[{"type": "function", "function": WEATHER}],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=100,
        temperature=0,
        **fields,
    )


def check_arguments(text: str) -> None:
    arguments = json.loads(text)
    assert arguments.keys() == {"city", "unit"}
    assert arguments["unit"] in SCHEMA["properties"]["unit"]["enum"]


@pytest.mark.parametrize("choice", CHOICES)
def test_demanded_calls_follow_the_schema(client: openai.OpenAI, choice: str) -> None:
    (answer,) = ask(client, CHOICES[choice]).choices
    (call,) = answer.message.tool_calls
    assert call.function.name == "weather"
    check_arguments(call.function.arguments)
    assert answer.finish_reason == ("stop" if choice == "named" else "tool_calls")


def test_streamed_arguments_follow_the_schema(client: openai.OpenAI) -> None:
    deltas = [chunk.choices[0] for chunk in ask(client, "required", stream=True) if chunk.choices]
    calls = [call for delta in deltas for call in delta.delta.tool_calls or ()]
    assert calls[0].function.name == "weather"
    check_arguments("".join(call.function.arguments or "" for call in calls))
    assert deltas[-1].finish_reason == "tool_calls"


def test_optional_tools_are_accepted(client: openai.OpenAI) -> None:
    (answer,) = ask(client, "auto").choices
    assert answer.message.content or answer.message.tool_calls


def test_the_model_answers_to_the_result_of_a_call(client: openai.OpenAI) -> None:
    (answer,) = ask(client, "required").choices
    result = {
        "role": "tool",
        "tool_call_id": answer.message.tool_calls[0].id,
        "content": "21 degrees and sunny",
    }
    followed = client.chat.completions.create(
        model=MODEL,
        messages=[*QUESTION, answer.message.model_dump(exclude_none=True), result],
        tools=[{"type": "function", "function": WEATHER}],
        tool_choice="none",
        max_tokens=20,
    )
    assert followed.usage is not None
    assert followed.usage.completion_tokens > 0


def test_responses_and_messages_call_tools(
    client: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    response = client.responses.create(
        model=MODEL,
        input=QUESTION[0]["content"],
        tools=[{"type": "function", "strict": False, **WEATHER}],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=100,
        temperature=0,
    )
    (item,) = response.output
    assert item.type == "function_call"
    check_arguments(item.arguments)
    message = claude.messages.create(
        model=MODEL,
        max_tokens=100,
        messages=QUESTION,
        tools=[{"name": "weather", "description": "Weather", "input_schema": SCHEMA}],
        tool_choice={"type": "tool", "name": "weather"},
    )
    (block,) = message.content
    assert block.type == "tool_use"
    check_arguments(json.dumps(block.input))


def test_models_list_their_parsers(client: openai.OpenAI) -> None:
    card: Any = client.models.retrieve(MODEL)
    assert (card.tool_call_parser, card.reasoning_parser) == ("hermes", None)
