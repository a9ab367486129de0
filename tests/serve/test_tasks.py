"""Typed tasks through the router: formats, order, chunking, charges, errors."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.admission import Identity, Tenant
from cluster.applications import languages
from cluster.applications.calls import Calls
from cluster.applications.engine import TaskEngine
from cluster.config import ApplicationsConfig
from cluster.config.applications import TASKS
from cluster.errors import UnavailableError
from cluster.gateway.pools.delegation import caller_headers
from tests import asgi
from tests.serve.task_kit import CONTEXT_TOKENS, num_tokens, task_world
from tests.serve.test_admission import Keys, metrics_inside

SENTENCE = "The river Elbe flows through Dresden and Hamburg into the sea. "
DOCUMENTS = [
    {"id": "rivers", "text": SENTENCE},
    {"id": "towns", "text": "Prague lies on the Vltava. The castle of Prague is old."},
]


def prompt(messages: list[dict[str, str]]) -> str:
    return messages[-1]["content"]


# -- summarize --------------------------------------------------------------------------------


async def test_a_summary_passes_through_with_the_usage_of_its_call() -> None:
    async with task_world(lambda messages: "The Elbe reaches the sea.") as tasks:
        result = await tasks.result("summarize", text=SENTENCE * 3, references=True)
        assert result["summary"] == "The Elbe reaches the sea."
        assert (result["model"], result["finish_reason"]) == ("gen", "stop")
        assert (result["usage"]["calls"], result["usage"]["completion_tokens"]) == (1, 7)
        (sentence,) = result["sentences"]
        assert sentence["text"] == "The Elbe reaches the sea."
        first = sentence["references"][0]
        assert SENTENCE.strip() == (SENTENCE * 3)[first["start"] : first["end"]]
        events = await tasks.events("summarize", text=SENTENCE)
        assert [event["delta"] for event in events[:-1]] == [
            *("The ", "Elbe ", "reaches ", "the ", "sea."),
        ]
        assert events[-1]["result"]["summary"] == "The Elbe reaches the sea."


async def test_a_long_text_is_summarized_in_parts_that_fit_the_context() -> None:
    text = "\n\n".join(f"Paragraph {i}. " + SENTENCE * 6 for i in range(30))

    def script(messages: list[dict[str, str]]) -> str:
        return " ".join(re.findall(r"Paragraph \d+|<\d+>", prompt(messages)))[:60] + "."

    async with task_world(script, max_calls=4) as tasks:
        result = await tasks.result("summarize", text=text, max_tokens=100)
        chunks = result["chunks"]
        assert len(chunks) > 5
        assert " ".join(text[c["start"] : c["end"]] for c in chunks).split() == text.split()
        assert all(c["tokens"] == num_tokens(text[c["start"] : c["end"]]) for c in chunks)
        for body in tasks.generator.bodies:
            used = sum(num_tokens(message["content"]) for message in body["messages"])
            assert used + body["max_tokens"] <= CONTEXT_TOKENS
        assert result["usage"]["calls"] == len(tasks.generator.bodies) > len(chunks)
        assert 1 < tasks.generator.peak <= 4


async def test_a_model_that_does_not_shorten_ends_the_summary() -> None:
    text = SENTENCE * 200
    async with task_world(lambda messages: SENTENCE * 30) as tasks:
        answer = await tasks.post("summarize", text=text, max_tokens=100)
        assert answer.status == 422
        assert "not shorter" in answer.json()["error"]["message"]


# -- translate --------------------------------------------------------------------------------


def shout(messages: list[dict[str, str]]) -> str:
    return prompt(messages).rpartition("\n\n")[2].upper()


async def test_paragraphs_are_translated_in_order_with_the_one_before_as_context() -> None:
    text = "Good morning.\n\n\nHow are you?\n\nFine."
    async with task_world(shout) as tasks:
        result = await tasks.result("translate", text=text, target="de", source="en")
        assert result["translation"] == text.upper()
        assert (result["segments"], result["detected"]) == (3, False)
        prompts = sorted(prompt(body["messages"]) for body in tasks.generator.bodies)
        assert any("Good morning." in each and "How are you?" in each for each in prompts)
        assert "English to German" in prompts[0]
        events = await tasks.events("translate", text=text, target="de", source="en")
        deltas = [event["delta"] for event in events[:-1]]
        assert deltas == ["GOOD MORNING.", "\n\n\n", "HOW ARE YOU?", "\n\n", "FINE."]


async def test_the_source_language_is_detected() -> None:
    languages.detect("Loads the model, which takes seconds.")
    async with task_world(shout) as tasks:
        text = "Der Fluss fließt durch die Stadt und mündet in das Meer."
        result = await tasks.result("translate", text=text, target="en-GB")
        assert (result["source"], result["detected"]) == ("de", True)
        result = await tasks.result("translate", text="1 + " * 600 + text, target="en")
        assert result["source"] == "de"
        answer = await tasks.post("translate", text="1 + 1 = 2", target="en")
        assert (answer.status, answer.json()["error"]["param"]) == (400, "source")


@pytest.mark.parametrize(
    ("tag", "status"),
    [
        *((tag, 200) for tag in ("de-1996", "sl-rozaj-biske", "zh-cmn-Hans-CN", "es-419")),
        *((tag, 200) for tag in ("de-DE-u-co-phonebk", "en-x-plain", "sr-Latn-RS")),
        *((tag, 400) for tag in ("d", "deutsch", "de_DE", "de-", "de--DE", "de-DE-DE", "de-u")),
        *((tag, 400) for tag in ("de-x", "12", "de\n", "de-u-co-" + "a" * 40)),
    ],
)
async def test_languages_are_tags_of_bcp_47(tag: str, status: int) -> None:
    async with task_world(shout) as tasks:
        answer = await tasks.post("translate", text="Hello", source="en", target=tag)
        assert answer.status == status


async def test_terms_of_the_glossary_reach_the_prompt_and_missing_ones_are_named() -> None:
    async with task_world(lambda messages: "Der Kern plant.") as tasks:
        result = await tasks.result(
            "translate",
            text="The kernel schedules threads.",
            source="en",
            target="de",
            formality="formal",
            glossary={"kernel": "Kern", "threads": "Fäden", "heap": "Halde"},
        )
        assert result["missing_terms"] == ["threads"]
        system = tasks.generator.bodies[-1]["messages"][0]["content"]
        assert "kernel: Kern" in system
        assert "heap" not in system
        assert "formally" in system


MARKDOWN = """# Title of it

Some *text* with `code_span` and a [link](https://example.org/a_b).

- first item
- [ ] second item
  1. nested

> quoted words

| Name | Use |
|------|:---:|
| cat  | pet |

```python
print("kept")
```

---
<br>
"""


async def test_markdown_structure_is_kept() -> None:
    async with task_world(shout) as tasks:
        request = {"text": MARKDOWN, "source": "en", "target": "de", "format": "markdown"}
        result = await tasks.result("translate", **request)
        expected = MARKDOWN.upper()
        for kept in ("`code_span`", "(https://example.org/a_b)", 'python\nprint("kept")', "<br>"):
            expected = expected.replace(kept.upper(), kept)
        assert result["translation"] == expected


async def test_markdown_is_kept_if_the_model_loses_a_placeholder() -> None:
    def script(messages: list[dict[str, str]]) -> str:
        return re.sub(r"\[\[\d+\]\]", "", shout(messages))

    async with task_world(script) as tasks:
        request = {"text": "Run `make` now.", "source": "en", "target": "de", "format": "markdown"}
        assert (await tasks.result("translate", **request))["translation"] == "RUN `make` NOW."


async def test_long_markdown_without_text_is_kept_in_one_piece() -> None:
    async with task_world(shout) as tasks:
        request = {"source": "en", "target": "de", "format": "markdown"}
        text = "# " + "|\n" * 50_000 + "word"
        events = await tasks.events("translate", text=text, **request)
        assert [event["delta"] for event in events[:-1]] == ["# " + "|\n" * 50_000, "WORD"]


async def test_a_long_paragraph_is_divided_by_sentences() -> None:
    text = SENTENCE.strip() + (" " + SENTENCE.strip()) * 60
    async with task_world(shout) as tasks:
        result = await tasks.result("translate", text=text, source="en", target="de")
        assert result["translation"] == text.upper()
        assert result["segments"] > 5


# -- answer -----------------------------------------------------------------------------------


async def test_an_answer_cites_passages() -> None:
    async with task_world(lambda messages: "Into the sea [1]. Not [9].") as tasks:
        request = {"question": "Where does the river Elbe flow?", "documents": DOCUMENTS}
        result = await tasks.result("answer", **request)
        assert (result["answer"], result["found"]) == ("Into the sea [1]. Not [9].", True)
        (citation,) = result["citations"]
        assert (citation["number"], citation["document"]) == (1, "rivers")
        assert SENTENCE[citation["start"] : citation["end"]] == citation["text"]
        assert "[1] The river Elbe" in prompt(tasks.generator.bodies[0]["messages"])
        events = await tasks.events("answer", **request)
        assert "".join(event["delta"] for event in events[:-1]) == "Into the sea [1]. Not [9]."


async def test_what_the_documents_lack_is_not_answered() -> None:
    async with task_world(lambda messages: '**"Not in the documents."**') as tasks:
        request = {"question": "Who invented the telephone?", "documents": DOCUMENTS}
        result = await tasks.result("answer", **request)
        assert (result["answer"], result["found"], result["usage"]["calls"]) == (None, False, 0)
        request["question"] = "How old is the castle of Prague?"
        result = await tasks.result("answer", **request)
        assert (result["answer"], result["found"], result["usage"]["calls"]) == (None, False, 1)
        events = await tasks.events("answer", **request)
        assert [list(event) for event in events] == [["result"]]


# -- sentiment, classify, extract -------------------------------------------------------------


async def test_sentiments_come_from_the_classifier_and_aspects_from_the_generator() -> None:
    aspects = json.dumps({"price": "negative", "taste": "positive"})
    async with task_world(lambda messages: aspects) as tasks:
        texts = ["good soup, but dear", "bad"]
        result = await tasks.result("sentiment", texts=texts, aspects=["price", "taste", "room"])
        assert [row["label"] for row in result["results"]] == ["positive", "negative"]
        assert result["results"][0]["aspects"] == {
            "price": "negative",
            "taste": "positive",
            "room": "absent",
        }
        assert result["model"] == "cls"
        assert result["usage"]["calls"] == 3
        schema = tasks.generator.bodies[0]["response_format"]["json_schema"]["schema"]
        assert schema["required"] == ["price", "taste", "room"]


async def test_aspects_need_a_generator_before_texts_are_classified() -> None:
    engine = TaskEngine(ApplicationsConfig(classifier="cls"), NoModels(), Path("none"))
    body = {"texts": ["good"], "aspects": ["price"]}
    answer = await asgi.post(engine.app, "/v1/tasks/sentiment", body)
    assert (answer.status, answer.json()["error"]["param"]) == (400, "generator")


async def test_labels_are_scored_against_a_text_without_content() -> None:
    async with task_world() as tasks:

        def logprob(messages: list[dict[str, str]]) -> float:
            label = messages[-1]["content"]
            is_neutral = "N/A" in messages[-2]["content"]
            prior = {"sport": -1.0, "politics": -5.0}[label]
            return prior if is_neutral else prior + (2.0 if label == "politics" else 0.0)

        tasks.generator.label_logprobs = logprob
        request = {"texts": ["The vote is tomorrow."], "labels": ["sport", "politics"]}
        result = await tasks.result("classify", **request)
        (row,) = result["results"]
        # The likelier label is sport, the likelier one for this text is politics: 1 / (1 + e^-2).
        assert (row["label"], row["score"]) == ("politics", 0.880797)
        assert result["usage"]["calls"] == 4
        assert tasks.generator.bodies[0]["continue_final_message"] is True


async def test_the_encoder_classifies_by_similarity() -> None:
    async with task_world() as tasks:
        request = {"texts": ["aab", "ccc"], "labels": ["a", "c"], "method": "encoder"}
        result = await tasks.result("classify", **request)
        assert [row["label"] for row in result["results"]] == ["a", "c"]
        assert (result["model"], result["usage"]["calls"]) == ("cls", 1)


SCHEMA = {
    "type": "object",
    "properties": {
        "people": {"type": "array", "items": {"type": "string"}},
        "year": {"type": "integer"},
    },
    "required": ["people"],
}


async def test_extracted_values_have_their_positions() -> None:
    data = {"people": ["Anna  Berg", "anna", "Zoe"], "year": 1969}
    async with task_world(lambda messages: json.dumps(data)) as tasks:
        text = "In 1969 Anna\nBerg met Anna."
        example = {"input": "Bob came.", "output": {"people": ["Bob"]}}
        request = {"text": text, "json_schema": SCHEMA, "examples": [example]}
        result = await tasks.result("extract", **request)
        assert result["data"] == data
        found = {span["path"]: text[span["start"] : span["end"]] for span in result["spans"]}
        assert found == {"/people/0": "Anna\nBerg", "/people/1": "Anna", "/year": "1969"}
        assert result["not_found"] == ["/people/2"]
        roles = [message["role"] for message in tasks.generator.bodies[0]["messages"]]
        assert roles == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("text", "output", "expected"),
    [
        ("It costs 12345.67 or 19.50 euros.", '{"a": 12345.67, "b": 19.50}', ["12345.67", "19.50"]),
        ("Between 3.5 and 5.", '{"a": 5}', ["5"]),
        ("1e3 and 7", '{"a": 7.0}', ["7"]),
        ("\U0001f600 STRASSE Straße.", '{"a": "straße", "b": "Straße"}', ["STRASSE", "Straße"]),
        ("e\u0301 e", '{"a": "e"}', ["e"]),
        ("我在北京工作。", '{"a": "北京"}', ["北京"]),
        ("서울에서", '{"a": "서울"}', ["서울"]),
    ],
)
async def test_positions_of_numbers_and_of_other_scripts(
    text: str, output: str, expected: list[str]
) -> None:
    async with task_world(lambda messages: output) as tasks:
        result = await tasks.result("extract", text=text, json_schema={"type": "object"})
        assert [text[s["start"] : s["end"]] for s in result["spans"]] == expected
        assert result["data"] == json.loads(output)
        # Not the parts of 3.5 and of e\u0301.
        assert result["spans"][-1]["start"] == text.rindex(expected[-1])


def doubling_schema(levels: int) -> dict[str, Any]:
    """Return a schema whose validation doubles its steps at each level."""
    defs: dict[str, Any] = {
        f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(levels)
    }
    return {"type": "object", "$ref": "#/$defs/a0", "$defs": {**defs, f"a{levels}": {}}}


@pytest.mark.parametrize(
    ("schema", "output", "status"),
    [
        (doubling_schema(40), "{}", 400),
        (doubling_schema(5), "{}", 200),
        ({"type": "object", "$ref": "#"}, "{}", 400),
        ({"properties": {"a": {"uniqueItems": True}}}, {"a": [{"b": i} for i in range(7000)]}, 400),
        ({"properties": {"a": {"multipleOf": 0.5}}}, '{"a": ' + "1" * 400 + "}", 400),
        (
            {"patternProperties": {"(a+)+$": {}}, "additionalProperties": False},
            {"a" * 40 + "b": 1},
            200,
        ),
        (
            {"patternProperties": {"(a+)+$": {}}, "unevaluatedProperties": False},
            {"a" * 40 + "b": 1},
            200,
        ),
        ({}, '{"a": ' * 300 + "1" + "}" * 300, 422),
        ({}, '{"a": "\\ud800"}', 422),
        ({}, '{"a": 1e999}', 422),
    ],
)
async def test_schemas_and_outputs_of_any_kind_are_checked_soon(
    schema: dict[str, Any], output: Any, status: int
) -> None:
    output = output if isinstance(output, str) else json.dumps(output)
    async with task_world(lambda messages: output) as tasks:
        json_schema = {"type": "object", **schema}
        answer = await tasks.post("extract", text="x", json_schema=json_schema)
        assert answer.status == status, answer.body


@pytest.mark.parametrize("output", ['{"people": 1}', '{"people": [', "[]", '{"people": [NaN]}'])
async def test_output_that_is_not_valid_by_the_schema_is_an_error(output: str) -> None:
    async with task_world(lambda messages: output) as tasks:
        answer = await tasks.post("extract", text="x", json_schema=SCHEMA)
        assert answer.status == 422


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array"},
        {"type": "object", "properties": 3},
        {"type": "object", "$ref": "http://127.0.0.1/schema"},
        {"type": "object", "description": "x" * 70_000},
    ],
)
async def test_unusable_schemas_are_refused(schema: dict[str, Any]) -> None:
    async with task_world() as tasks:
        answer = await tasks.post("extract", text="x", json_schema=schema)
        assert answer.status == 400
        assert answer.json()["error"]["param"].startswith("json_schema")
        assert not tasks.generator.bodies


# -- templates --------------------------------------------------------------------------------


async def test_user_text_is_never_a_template() -> None:
    text = "Costs $5, ${language} $text {text} %(text)s {{ 7 * 7 }}"
    async with task_world() as tasks:
        await tasks.result("summarize", text=text, examples=[{"input": "$text", "output": "$x"}])
        sent = [message["content"] for message in tasks.generator.bodies[0]["messages"]]
        assert text in sent[-1]
        assert "$text" in sent[1]
        assert sent[2] == "$x"


async def test_an_operator_replaces_templates(tmp_path: Path) -> None:
    (tmp_path / "summarize.yaml").write_text("user: 'TL;DR in $$: $text'")
    async with task_world(templates=str(tmp_path)) as tasks:
        await tasks.result("summarize", text="Hello")
        assert tasks.generator.bodies[0]["messages"] == [
            {"role": "user", "content": "TL;DR in $: Hello"}
        ]


# -- tenants ----------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.yaml")


async def test_calls_are_charged_to_the_sender_of_the_task(keys: Keys) -> None:
    keys.write(acme={"tokens_per_day": 10_000}, other={})
    async with task_world(lambda messages: "four words are here", keys.file) as tasks:
        answer = await tasks.post("summarize", key="acme", text=SENTENCE * 100)
        assert answer.status == 200
        usage = answer.json()["usage"]
        await tasks.world.until_idle()
        found = await metrics_inside(tasks.world)
        # Tokenizing, and the task's own request, have no tokens.
        by_labels = {frozenset(labels): value for labels, value in found.items()}
        labels = {"tandem_tenant_tokens_total", "acme", "prompt", "gen"}
        assert by_labels[frozenset(labels)] == usage["prompt_tokens"]
        accounts = tasks.world.gateway.admission.quotas.accounts
        assert accounts["acme"].day_tokens == usage["total_tokens"] > 1000
        assert {dict(s["headers"])[b"x-tandem-tenant"] for s in tasks.generator.scopes} == {b"acme"}
        assert "other" not in accounts


async def test_a_task_ends_although_its_tenant_may_have_one_concurrent_request(keys: Keys) -> None:
    keys.write(acme={"max_concurrent": 1, "requests_per_minute": 60})
    async with task_world(lambda messages: "short", keys.file) as tasks:
        answer = await tasks.post("summarize", key="acme", text=SENTENCE * 100)
        assert answer.status == 200
        assert answer.json()["usage"]["calls"] > 5
        assert tasks.generator.peak == 1


async def test_calls_of_several_tasks_keep_the_tenants_limit(keys: Keys) -> None:
    keys.write(acme={"max_concurrent": 3})
    async with task_world(lambda messages: "short", keys.file) as tasks:
        posts = [tasks.post("summarize", key="acme", text=SENTENCE * 100) for _ in range(2)]
        answers = await asyncio.gather(*posts)
        assert [answer.status for answer in answers] == [200, 200]
        # Each task's request holds a slot, which one of its calls shares; one slot is left.
        assert tasks.generator.peak <= 3


async def test_an_exhausted_budget_ends_the_task(keys: Keys) -> None:
    keys.write(acme={"tokens_per_day": 50})
    async with task_world(lambda messages: "short", keys.file) as tasks:
        answer = await tasks.post("summarize", key="acme", text=SENTENCE * 100)
        assert answer.status == 429
        assert int(answer.headers["retry-after"]) > 0


async def test_the_key_must_allow_the_model_that_a_task_calls(keys: Keys) -> None:
    keys.write(acme={"models": ["cls"]})
    async with task_world(key_file=keys.file) as tasks:
        assert (await tasks.post("summarize", key="acme", text="Hello")).status == 403
        assert (await tasks.post("sentiment", key="acme", texts=["good"])).status == 200
        assert (await tasks.post("sentiment", texts=["good"])).status == 401


async def test_a_key_may_allow_thousands_of_models(keys: Keys) -> None:
    adapters = [f"organization/adapter-of-customer-{number}" for number in range(5000)]
    keys.write(acme={"models": ["gen", *adapters]})
    async with task_world(key_file=keys.file) as tasks:
        assert (await tasks.post("summarize", key="acme", text="Hello")).status == 200
        assert (await tasks.post("sentiment", key="acme", texts=["good"])).status == 403


async def test_calls_belong_to_the_trace_and_have_ids_and_priority_of_the_task(keys: Keys) -> None:
    keys.write(acme={"priority": 5})
    async with task_world(key_file=keys.file) as tasks:
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        sent = {"traceparent": trace, "x-request-id": "r" * 128, "x-tandem-priority": "3"}
        headers = {"x-api-key": "acme", **sent}
        body = {"text": SENTENCE * 60}
        answer = await asgi.post(tasks.world.app, "/v1/tasks/summarize", body, headers=headers)
        assert answer.status == 200
        seen = [dict(scope["headers"]) for scope in tasks.generator.scopes]
        assert {each[b"traceparent"] for each in seen} == {trace.encode()}
        assert {each[b"x-vllm-priority"] for each in seen} == {b"-3"}
        ids = {each[b"x-request-id"].decode() for each in seen}
        assert len(ids) == len(seen)
        assert all(id_.startswith("r" * 115 + ".") for id_ in ids)


async def test_guards_check_the_calls() -> None:
    guard = {"name": "mail", "patterns": ["email"], "action": "redact", "default": False}
    async with task_world(args={"guards": [guard]}) as tasks:
        body = {"text": "Write to anna@example.com soon."}
        for headers in ({}, {"x-tandem-guards": "mail"}):
            app = tasks.world.app
            answer = await asgi.post(app, "/v1/tasks/summarize", body, headers=headers)
            assert answer.status == 200
        sent = [prompt(body["messages"]) for body in tasks.generator.bodies]
        assert ["anna@example.com" in each for each in sent] == [True, False]


async def test_clients_cannot_claim_another_tenant(keys: Keys) -> None:
    keys.write(acme={}, other={})
    async with task_world(key_file=keys.file) as tasks:
        ((_, value),) = caller_headers([], Identity(Tenant("other")), 0)
        headers = {"x-api-key": "acme", "x-tandem-caller": value.decode()}
        body = {"text": "Hello"}
        answer = await asgi.post(tasks.world.app, "/v1/tasks/summarize", body, headers=headers)
        assert answer.status == 200
        assert set(tasks.world.gateway.admission.quotas.accounts) == {"acme"}


async def test_work_begins_only_for_as_many_items_as_calls_are_allowed() -> None:
    calls = Calls("id", NoModels(), [], max_calls=3)
    running = peak = started = 0

    async def work(item: int) -> int:
        nonlocal running, peak, started
        started += 1
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.001 * (item % 3))
        running -= 1
        if item == 30:
            raise UnavailableError("no model")
        return -item

    assert await calls.map(work, range(20)) == [-item for item in range(20)]
    assert peak == 3
    started = 0
    with pytest.raises(UnavailableError):
        await calls.map(work, range(25, 1000))
    assert started < 20  # those before the failure, and those beside it


# -- errors -----------------------------------------------------------------------------------


async def test_a_disconnect_ends_the_calls() -> None:
    async with task_world() as tasks:
        tasks.generator.gate = asyncio.Event()
        body = {"text": SENTENCE * 300}
        call = asgi.start(tasks.world.app, "POST", "/v1/tasks/summarize", body)
        await tasks.world.until(lambda: tasks.generator.running == 8)  # applications.max_calls
        await call.cancel()
        await tasks.world.until(lambda: tasks.generator.running == 0)
        tasks.generator.gate.set()
        await tasks.world.until_idle()


@pytest.mark.parametrize(
    ("task", "body", "status", "param"),
    [
        ("summarize", {}, 400, "text"),
        ("summarize", {"text": " \n"}, 400, "text"),
        ("summarize", {"text": "x", "lenght": "short"}, 400, "lenght"),
        ("summarize", {"text": "x" * 1001}, 413, None),
        ("summarize", {"text": "x", "model": "nothing"}, 404, "model"),
        ("summarize", {"text": "x", "model": "cls"}, 400, "model"),
        ("summarize", {"text": "x", "max_tokens": 600}, 400, None),
        ("translate", {"text": "x", "target": "not a tag"}, 400, "target"),
        ("answer", {"question": "x", "documents": []}, 400, "documents"),
        (
            "answer",
            {"question": "x", "documents": [{"text": "x"}, {"text": "y", "id": "0"}]},
            400,
            "documents",
        ),
        ("classify", {"texts": ["x"], "labels": ["a", "a"]}, 400, "labels"),
        (
            "classify",
            {"texts": ["x"] * 200, "labels": list("abcdefghijklmnopqrstuvwxyz")},
            400,
            "texts",
        ),
        ("sentiment", {"texts": ["x"], "model": "gen"}, 400, "model"),
    ],
)
async def test_bad_requests_have_typed_errors(
    task: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    async with task_world(max_chars=1000) as tasks:
        answer = await tasks.post(task, **body)
        assert (answer.status, answer.json()["error"]["param"]) == (status, param), answer.body
        assert not tasks.generator.bodies


async def test_other_paths_and_methods() -> None:
    async with task_world() as tasks:
        app = tasks.world.app
        assert (await asgi.post(app, "/v1/tasks/paint", {})).status == 404
        assert (await asgi.get(app, "/v1/tasks/answer")).status == 405
        assert (
            await asgi.post(app, "/v1/chat/completions", {"model": "applications"})
        ).status == 404
        listed = (await asgi.get(app, "/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == ["gen", "cls"]
        ready = (await asgi.get(app, "/ready")).json()
        assert ready["pools"]["applications"]["ready"] == 1
        document = (await asgi.get(app, "/openapi.json")).json()
        assert {f"/v1/tasks/{task}" for task in TASKS} <= document["paths"].keys()
        assert "SummarizeRequest" in document["components"]["schemas"]


async def test_an_error_after_the_first_piece_is_an_event() -> None:
    async with task_world(shout, max_calls=1) as tasks:
        tasks.generator.fails_at = 1
        text = "\n\n".join(f"Line {i}" for i in range(4))
        events = await tasks.events("translate", text=text, source="en", target="de")
        assert events[-1]["error"]["code"] == 500


async def test_a_stream_whose_application_dies_ends_with_an_error_and_done() -> None:
    def answer_once(messages: list[dict[str, str]]) -> str:
        tasks.generator.gate = asyncio.Event()  # later calls wait
        return "One."

    async with task_world(answer_once, max_calls=1) as tasks:
        body = {"text": "One.\n\nTwo.", "source": "en", "target": "de", "stream": True}
        call = asgi.start(tasks.world.app, "POST", "/v1/tasks/translate", body)
        await call.chunks(1)
        await tasks.world.kill("app-1")
        answer = await call.done()
        first, *_, last = answer.data()
        assert first == {"delta": "One."}
        assert last["error"]["code"] == 503
        assert "replica was lost" in last["error"]["message"]
        assert answer.body.endswith(b"}\n\ndata: [DONE]\n\n")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["text", "texts", "target", "labels", "question", "documents", "json_schema", "stream", "model"]
)


@settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.sampled_from(TASKS),
    st.dictionaries(FIELDS, json_values, max_size=4) | json_values | st.binary(max_size=40),
)
def test_any_body_gets_an_answer_or_a_typed_error(task: str, body: Any) -> None:
    async def send() -> asgi.Answer:
        engine = TaskEngine(ApplicationsConfig(), NoModels(), Path("none"))
        await engine.start()
        return await asgi.post(engine.app, f"/v1/tasks/{task}", body)

    answer = asyncio.run(send())
    assert 400 <= answer.status < 500 or answer.status in (501, 503), answer.body
    assert answer.json()["error"]["type"]


class NoModels:
    """Client of a cluster whose models do not answer."""

    async def run(self, requests: Any, headers: Any = ()) -> list[Any]:
        raise UnavailableError("no model")

    async def delta_batches(self, body: bytes, headers: Any = ()) -> Any:
        raise UnavailableError("no model")
        yield

    async def aclose(self) -> None:
        pass
