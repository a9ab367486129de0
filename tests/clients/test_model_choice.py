"""``model: auto`` and fallbacks with a real classifier, through the vendors' clients."""

from collections.abc import Iterator

import anthropic
import openai
import pytest

from tests.clients.conftest import ANSWER, MESSAGES, Server

BAD = "This is a terrible, boring, awful film. I hated it."


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.openai_url, api_key=server.key, max_retries=0) as made:
        yield made


def test_no_rule_holds_for_a_question(client: openai.OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="auto", messages=MESSAGES, max_tokens=10, temperature=0
    )
    assert answer.headers["x-tandem-model-choice"] == "smollm2; rule=default"
    parsed = answer.parse()
    assert (parsed.model, parsed.choices[0].message.content) == ("smollm2", ANSWER)


def test_the_classifiers_label_chooses_the_model(client: openai.OpenAI, server: Server) -> None:
    expected = "slow; rule=1; label=NEGATIVE "
    messages = [*MESSAGES, {"role": "user", "content": BAD}]
    stream = client.chat.completions.with_raw_response.create(
        model="auto", messages=messages, max_tokens=2, stream=True
    )
    assert stream.headers["x-tandem-model-choice"].startswith(expected)
    assert {chunk.model for chunk in stream.parse()} == {"slow"}
    with anthropic.Anthropic(base_url=server.url, api_key=server.key, max_retries=0) as claude:
        message = claude.messages.with_raw_response.create(
            model="auto", messages=messages, max_tokens=2
        )
    assert message.headers["x-tandem-model-choice"].startswith(expected)
    assert message.parse().model == "slow"


def test_the_length_of_the_prompt_chooses_the_model(client: openai.OpenAI) -> None:
    answer = client.completions.with_raw_response.create(
        model="auto", prompt="A wonderful day. " * 300, max_tokens=1
    )
    assert answer.headers["x-tandem-model-choice"].startswith("slow; rule=2")
    assert answer.parse().model == "slow"


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_without_replicas_is_replaced_by_its_fallbacks(
    client: openai.OpenAI, stream: bool
) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="replaced", messages=MESSAGES, max_tokens=10, temperature=0, stream=stream
    )
    assert answer.headers["x-tandem-fallback"] == "replaced=503, asleep=503"
    found = list(answer.parse()) if stream else [answer.parse()]
    assert {each.model for each in found} == {"smollm2"}
