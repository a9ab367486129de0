"""Stream an answer and call a tool with Anthropic's client.

Run it anywhere: `TANDEM_URL=... TANDEM_API_KEY=... python examples/anthropic_sdk.py`.
"""

import os

from anthropic import Anthropic

WEATHER = {
    "name": "weather",
    "description": "Return the weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def stream(client: Anthropic) -> None:
    question = {"role": "user", "content": "What is the capital of France?"}
    with client.messages.stream(model="smollm2", max_tokens=20, messages=[question]) as answer:
        for text in answer.text_stream:
            print(text, end="", flush=True)
    print()


def call_tool(client: Anthropic) -> None:
    answer = client.messages.create(
        model="smollm2",
        max_tokens=64,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[WEATHER],
        tool_choice={"type": "tool", "name": "weather"},
    )
    for part in answer.content:
        if part.type == "tool_use":
            print(part.name, part.input)


if __name__ == "__main__":
    with Anthropic(
        base_url=os.environ.get("TANDEM_URL", "http://127.0.0.1:8000"),
        api_key=os.environ.get("TANDEM_API_KEY", "none"),
    ) as client:
        stream(client)
        call_tool(client)
