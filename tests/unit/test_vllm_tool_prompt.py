"""Chat templates that ignore tools show them after ``TOOL_PROMPT``."""

import json
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.engines.vllm.tool_prompt import TOOL_PROMPT

# As strict as Gemma's: no system messages, and the roles alternate.
ALTERNATING = (
    "{% for m in messages %}"
    "{% if m.role != ('assistant' if loop.index0 % 2 else 'user') %}{{ fail(m.role) }}{% endif %}"
    "[{{ m.role }}]{{ m.content if m.content is string else m.content | map(attribute='text') "
    "| join('|') }}{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ASKED = {"role": "user", "content": "Warm?"}
CALLS = [
    {"id": str(i), "type": "function", "function": {"name": "weather", "arguments": {"day": i}}}
    for i in range(2)
]
CALLED = {"role": "assistant", "content": None, "tool_calls": CALLS}
RESULTS = [{"role": "tool", "tool_call_id": str(i), "content": f"{20 + i}°"} for i in range(2)]


def render(template: str, messages: list[dict[str, Any]], tools: Any = None) -> str:
    # The options of transformers.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)

    def fail(role: str) -> None:
        raise ValueError(role)

    environment.globals["fail"] = fail
    return environment.from_string(template).render(messages=messages, tools=tools)


@pytest.mark.parametrize("start", ["", "\n", "  \n", "{{- '' }}", "text\n"])
def test_prompts_without_tools_are_unchanged(start: str) -> None:
    messages = [ASKED, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Ok"}]
    template = start + ALTERNATING
    assert render(TOOL_PROMPT + template, messages) == render(template, messages)


def test_the_first_user_message_shows_the_tools() -> None:
    messages = [ASKED, {"role": "assistant", "content": "Yes."}, ASKED]
    shown, *later = render(TOOL_PROMPT + ALTERNATING, messages, TOOLS).split("[assistant]")
    assert json.dumps(TOOLS[0]["function"]) in shown
    assert shown.startswith("[user]You can call")
    assert shown.endswith("\n\nWarm?")
    assert later == ["Yes.[user]Warm?"]


def test_tools_precede_messages_of_several_parts() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Warm?"}]}]
    shown = render(TOOL_PROMPT + ALTERNATING, messages, TOOLS)
    assert shown.endswith("</tool_call>\n\n|Warm?")


@pytest.mark.parametrize("tools", [TOOLS, None])
def test_calls_and_results_become_alternating_messages(tools: Any) -> None:
    messages = [ASKED, CALLED, *RESULTS, {"role": "assistant", "content": "Yes."}]
    shown = render(TOOL_PROMPT + ALTERNATING, messages, tools)
    _, calls, end = shown.split("[assistant]")
    calls, results = calls.split("[user]")
    for call in CALLS:
        assert f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>" in calls
    parts = [f"<tool_response>\n{result['content']}\n</tool_response>\n" for result in RESULTS]
    assert (results, end) == ("".join(parts), "Yes.")


def test_results_can_have_several_parts() -> None:
    parts = [{"type": "text", "text": "20°"}, {"type": "text", "text": "sunny"}]
    messages = [ASKED, CALLED, {"role": "tool", "content": parts}]
    shown = render(TOOL_PROMPT + ALTERNATING, messages, TOOLS)
    assert shown.endswith("<tool_response>\n20°\nsunny\n</tool_response>\n")
