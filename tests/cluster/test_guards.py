"""Guards in a real cluster: a real classifier and vLLM's answers, with the vendors' clients."""

from collections.abc import Callable
from typing import Any

import anthropic
import openai
import pytest

GOOD = "Name three colors of the rainbow."
BAD = "This is a terrible, boring, awful film. I hated it."
MODEL, LIMIT = "smollm2", 8
PERSONAL = {"x-tandem-guards": "personal-data"}
Ask = Callable[[str, dict[str, str]], str]


@pytest.fixture
def asks(client: openai.OpenAI, claude: anthropic.Anthropic) -> dict[str, Ask]:
    """Return functions that ask in each API, streamed and not, with further headers."""

    def chat(text: str, headers: dict[str, str], **options: Any) -> Any:
        return client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": text}],
            max_tokens=LIMIT,
            temperature=0,
            extra_headers=headers,
            **options,
        )

    def complete(text: str, headers: dict[str, str], **options: Any) -> Any:
        return client.completions.create(
            model=MODEL,
            prompt=text,
            max_tokens=LIMIT,
            temperature=0,
            extra_headers=headers,
            **options,
        )

    def respond(text: str, headers: dict[str, str]) -> str:
        return client.responses.create(
            model=MODEL, input=text, max_output_tokens=LIMIT, temperature=0, extra_headers=headers
        ).output_text

    def respond_streamed(text: str, headers: dict[str, str]) -> str:
        with client.responses.stream(
            model=MODEL, input=text, max_output_tokens=LIMIT, temperature=0, extra_headers=headers
        ) as stream:
            pieces = [each.delta for each in stream if each.type == "response.output_text.delta"]
            assert stream.get_final_response().output_text == "".join(pieces)
            return "".join(pieces)

    fields: dict[str, Any] = {"model": MODEL, "max_tokens": LIMIT}
    greedy = {"temperature": 0}

    def message(text: str, headers: dict[str, str]) -> str:
        messages: Any = [{"role": "user", "content": text}]
        answer = claude.messages.create(
            messages=messages, extra_body=greedy, extra_headers=headers, **fields
        )
        return "".join(part.text for part in answer.content if part.type == "text")

    def message_streamed(text: str, headers: dict[str, str]) -> str:
        messages: Any = [{"role": "user", "content": text}]
        with claude.messages.stream(
            messages=messages, extra_body=greedy, extra_headers=headers, **fields
        ) as stream:
            return "".join(stream.text_stream)

    return {
        "chat": lambda text, headers: chat(text, headers).choices[0].message.content,
        "chat streamed": lambda text, headers: "".join(
            chunk.choices[0].delta.content or "" for chunk in chat(text, headers, stream=True)
        ),
        "completions": lambda text, headers: complete(text, headers).choices[0].text,
        "completions streamed": lambda text, headers: "".join(
            chunk.choices[0].text for chunk in complete(text, headers, stream=True)
        ),
        "responses": respond,
        "responses streamed": respond_streamed,
        "messages": message,
        "messages streamed": message_streamed,
    }


def test_a_guard_that_finds_nothing_changes_no_answer(asks: dict[str, Ask]) -> None:
    for name in ("chat", "completions", "responses", "messages"):
        plain = asks[f"{name} streamed"](GOOD, {})
        assert plain, name
        assert asks[f"{name} streamed"](GOOD, PERSONAL) == plain, name
        assert asks[name](GOOD, PERSONAL) == plain, name


def test_a_classifier_of_the_cluster_blocks_a_prompt(asks: dict[str, Ask]) -> None:
    tone = {"x-tandem-guards": "tone"}
    for name in ("chat", "chat streamed", "responses"):
        with pytest.raises(openai.BadRequestError) as blocked:
            asks[name](BAD, tone)
        assert blocked.value.code == "content_filter"
        assert blocked.value.response.headers["x-tandem-guard"] == "tone=blocked"
    with pytest.raises(anthropic.BadRequestError, match="`tone`"):
        asks["messages streamed"](BAD, tone)
    assert asks["chat"](BAD, {})


def test_personal_data_reaches_no_engine(client: openai.OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Repeat exactly: anna@example.com"}],
        max_tokens=LIMIT,
        temperature=0,
        extra_headers=PERSONAL,
        extra_body={"return_prompt_text": True, "return_token_ids": True},
    )
    assert answer.headers["x-tandem-guard"] == "personal-data=redacted"
    prompt_ids = answer.parse().model_dump()["prompt_token_ids"]
    prompt = client.post(
        "/../detokenize", body={"model": MODEL, "tokens": prompt_ids}, cast_to=dict[str, Any]
    )["prompt"]
    assert "Repeat exactly: [EMAIL_1]" in prompt
