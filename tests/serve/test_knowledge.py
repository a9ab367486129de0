"""Knowledge bases through the router: documents, searches, answers, tenants, bounds."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.applications.engine import TaskEngine
from cluster.applications.knowledge.store import Store
from cluster.applications.knowledge.table import BaseSettings, Row
from cluster.config import ApplicationsConfig
from cluster.config.applications import KnowledgeConfig
from cluster.metrics import Registry, table
from cluster.tasks.knowledge import Mode
from tests import asgi
from tests.serve.task_kit import Script, TaskWorld, num_tokens, task_world
from tests.serve.test_admission import Keys, metrics_inside
from tests.serve.test_tasks import NoModels, json_values

RIVERS = """# Rivers

The Elbe rises in the mountains.

## Mouth

The Elbe ends in the North Sea near Cuxhaven.

## Towns

Dresden and Hamburg lie on the Elbe.
"""
NOTES = "The zebra crossing is closed.\n\nThe harbour opens at nine."


class Knowledge:
    """Client of the knowledge bases of one key."""

    def __init__(self, tasks: TaskWorld, key: str | None = None) -> None:
        self.tasks = tasks
        self._headers = {"x-api-key": key} if key else {}

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> asgi.Answer:
        return await asgi.call(
            self.tasks.world.app,
            method,
            f"/v1/knowledge{path}",
            body,
            headers={**self._headers, **headers},
        )

    async def result(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        answer = await self.call(method, path, body)
        assert answer.status == 200, answer.body
        result: dict[str, Any] = answer.json()
        return result

    async def upload(
        self, name: str, filename: str, content: str | bytes, **fields: str
    ) -> asgi.Answer:
        boundary = uuid4().hex
        content = content.encode() if isinstance(content, str) else content
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
            for key, value in fields.items()
        ]
        head = f'Content-Disposition: form-data; name="file"; filename="{filename}"\r\n\r\n'
        before = "".join(parts) + f"--{boundary}\r\n{head}"
        body = before.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        kind = {"content-type": f"multipart/form-data; boundary={boundary}"}
        return await self.call("POST", f"/{name}/documents", body, **kind)

    async def add(
        self, name: str, filename: str, content: str | bytes, **fields: str
    ) -> dict[str, Any]:
        answer = await self.upload(name, filename, content, **fields)
        assert answer.status == 200, answer.body
        result: dict[str, Any] = answer.json()
        return result

    async def search(self, name: str, query: str, **fields: Any) -> list[dict[str, Any]]:
        body = {"query": query, **fields}
        return (await self.result("POST", f"/{name}/search", body))["passages"]  # type: ignore[no-any-return]


@asynccontextmanager
async def knowledge_world(
    script: Script | None = None, **applications: Any
) -> AsyncIterator[Knowledge]:
    async with task_world(script, **applications) as tasks:
        yield Knowledge(tasks)


async def test_documents_are_added_searched_and_deleted() -> None:
    async with knowledge_world() as knowledge:
        created = await knowledge.result("POST", "", {"name": "docs", "chunk_tokens": 32})
        assert (created["model"], created["dimensions"], created["passages"]) == ("cls", 3, 0)
        assert await knowledge.result("POST", "", {"name": "docs", "chunk_tokens": 32}) == created
        added = await knowledge.add("docs", "rivers.md", RIVERS)
        assert (added["embedded"], added["kept"], added["removed"]) == (3, 0, 0)
        assert added["document"]["type"] == "markdown"
        await knowledge.add("docs", "notes.txt", NOTES, id="notes/first.txt")
        best = (await knowledge.search("docs", "Where does the Elbe end, at Cuxhaven?"))[0]
        assert best["heading"] == ["Rivers", "Mouth"]
        assert RIVERS[best["start"] : best["end"]] == best["text"]
        assert "Cuxhaven" in best["text"]
        listed = (await knowledge.result("GET", "/docs/documents"))["data"]
        assert [each["id"] for each in listed] == ["notes/first.txt", "rivers.md"]
        page = await knowledge.result("GET", "/docs/documents?limit=1&after=notes/first.txt")
        assert ([each["id"] for each in page["data"]], page["has_more"]) == (["rivers.md"], False)
        await knowledge.result("DELETE", "/docs/documents/notes/first.txt")
        assert not await knowledge.search("docs", "zebra", mode="text")
        assert (await knowledge.result("GET", "/docs"))["passages"] == 3
        await knowledge.result("DELETE", "/docs")
        assert (await knowledge.call("GET", "/docs")).status == 404
        assert (await knowledge.result("GET", ""))["data"] == []


async def test_answers_cite_passages_and_stream() -> None:
    async with knowledge_world(lambda messages: "It ends in the North Sea [1].") as knowledge:
        await knowledge.result("POST", "", {"name": "docs"})
        await knowledge.add("docs", "rivers.md", RIVERS)
        question = {"question": "Where does the Elbe end?"}
        answer = await knowledge.result("POST", "/docs/answer", question)
        assert (answer["found"], answer["answer"]) == (True, "It ends in the North Sea [1].")
        (citation,) = answer["citations"]
        assert (citation["document"], citation["number"]) == ("rivers.md", 1)
        assert RIVERS[citation["start"] : citation["end"]] == citation["text"]
        prompt = knowledge.tasks.generator.bodies[-1]["messages"][-1]["content"]
        assert "North Sea" in prompt
        streamed = await knowledge.call("POST", "/docs/answer", {**question, "stream": True})
        events = [json.loads(data) for _, data in streamed.events() if data != "[DONE]"]
        assert events[0] == {"delta": "It "}
        assert events[-1]["result"]["citations"] == answer["citations"]


async def test_a_question_below_the_threshold_is_not_in_the_documents() -> None:
    async with knowledge_world() as knowledge:
        await knowledge.result("POST", "", {"name": "docs"})
        body = {"question": "Who wrote Faust?", "threshold": 0.9}
        empty = await knowledge.result("POST", "/docs/answer", body)
        assert (empty["found"], empty["answer"], empty["relevance"]) == (False, None, 0.0)
        await knowledge.add("docs", "notes.txt", NOTES)
        answer = await knowledge.result("POST", "/docs/answer", body)
        assert (answer["found"], answer["answer"], answer["threshold"]) == (False, None, 0.9)
        assert not knowledge.tasks.generator.bodies


# -- tenants ----------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.yaml")


async def test_tenants_do_not_see_each_other(keys: Keys) -> None:
    tenants = ("a", "b", "a.b", "A")
    keys.write(**{name: {} for name in tenants})
    async with task_world(key_file=keys.file) as tasks:
        for name in tenants:
            own = Knowledge(tasks, name)
            assert (await own.result("GET", ""))["data"] == []
            await own.result("POST", "", {"name": "docs"})
            await own.add("docs", "note.txt", f"The secret of tenant {name} is a zebra.")
        for name in tenants:
            own = Knowledge(tasks, name)
            found = await own.search("docs", "zebra secret")
            assert [each["text"] for each in found] == [f"The secret of tenant {name} is a zebra."]
        await Knowledge(tasks, "a").result("DELETE", "/docs")
        assert (await Knowledge(tasks, "a").call("GET", "/docs")).status == 404
        assert (await Knowledge(tasks, "b").result("GET", "/docs"))["passages"] == 1
        assert (await Knowledge(tasks).call("GET", "")).status == 401


async def test_embeddings_are_charged_to_the_senders_tenant(keys: Keys) -> None:
    keys.write(a={}, b={"models": ["gen"]})
    async with task_world(key_file=keys.file) as tasks:
        assert (await Knowledge(tasks, "b").call("POST", "", {"name": "docs"})).status == 403
        own = Knowledge(tasks, "a")
        await own.result("POST", "", {"name": "docs"})
        added = await own.add("docs", "notes.txt", NOTES)
        assert added["usage"]["prompt_tokens"] == num_tokens(NOTES)
        found = await own.result("POST", "/docs/search", {"query": "zebra"})
        assert (found["usage"]["calls"], found["usage"]["prompt_tokens"]) == (1, 2)
        await tasks.world.until_idle(30)
        found = await metrics_inside(tasks.world)
        by_labels = {frozenset(labels): value for labels, value in found.items()}
        labels = {"tandem_tenant_tokens_total", "a", "prompt", "cls"}
        tokens_of_name = num_tokens("docs")  # embedded when the base is created
        assert by_labels[frozenset(labels)] == num_tokens(NOTES) + 2 + tokens_of_name


# -- updates ----------------------------------------------------------------------------------


async def test_a_changed_file_replaces_only_the_passages_that_differ() -> None:
    async with knowledge_world() as knowledge:
        await knowledge.result("POST", "", {"name": "docs", "chunk_tokens": 32})
        await knowledge.add("docs", "rivers.md", RIVERS)
        await knowledge.add("docs", "other.md", RIVERS)
        same = await knowledge.add("docs", "rivers.md", RIVERS)
        assert (same["embedded"], same["kept"], same["usage"]["calls"]) == (0, 3, 0)
        longer = RIVERS.replace("rises in the mountains", "rises in the Giant Mountains")
        changed = await knowledge.add("docs", "rivers.md", longer)
        assert (changed["embedded"], changed["kept"], changed["removed"]) == (1, 2, 1)
        passages = await knowledge.search("docs", "Elbe", mode="text")
        own = [each for each in passages if each["document"] == "rivers.md"]
        assert len(own) == 3
        for each in own:  # also those that moved
            assert longer[each["start"] : each["end"]] == each["text"]
        shorter = longer[: longer.index("## Towns")]
        cut = await knowledge.add("docs", "rivers.md", shorter)
        assert (cut["embedded"], cut["kept"], cut["removed"]) == (0, 2, 1)
        assert (await knowledge.result("GET", "/docs"))["passages"] == 5
        document = (await knowledge.result("GET", "/docs/documents"))["data"][1]
        assert (document["id"], document["passages"]) == ("rivers.md", 2)


async def test_equal_passages_of_a_document_are_all_kept() -> None:
    async with knowledge_world() as knowledge:
        await knowledge.result("POST", "", {"name": "docs", "chunk_tokens": 32})
        text = "\n\n".join(
            ["The same words again and again, twenty of them, so that no two fit."] * 5
        )
        assert (await knowledge.add("docs", "a.txt", text))["embedded"] == 5
        assert (await knowledge.add("docs", "a.txt", text + " "))["kept"] == 5


async def test_many_changes_at_once_are_all_kept() -> None:
    async with knowledge_world(knowledge={"max_uploads": 8}) as knowledge:
        await knowledge.result("POST", "", {"name": "docs"})
        texts = [f"Document {index} names the number {index}." for index in range(12)]
        await asyncio.gather(
            *(knowledge.add("docs", f"{index}.txt", text) for index, text in enumerate(texts)),
            *(knowledge.add("docs", "same.txt", text) for text in texts),
        )
        assert (await knowledge.result("GET", "/docs"))["passages"] == 13


async def test_two_replicas_that_add_the_same_document_store_it_once(tmp_path: Path) -> None:
    stores = [Store(str(tmp_path), KnowledgeConfig()) for _ in range(2)]
    settings = BaseSettings("cls", 3, 200, "English")
    tables = [await store.create("acme", "docs", settings) for store in stores]
    rows = [Row(f"id-{n}", n, f"Text {n}", 0, [], None, 0, 6) for n in range(5)]
    vectors = np.ones((5, 3), np.float32)
    adds = [table.replace_document("a", {"id": "a"}, rows, vectors) for table in tables * 2]
    await asyncio.gather(*adds)
    assert [await table.count() for table in tables] == [5, 5]
    await tables[0].maintain(index_passages=1000)
    found = await tables[1].search("text 3", vectors[0], "text", 10)
    assert found[0]["content"] == "Text 3"
    for store in stores:
        await store.close()


@pytest.mark.parametrize("language", ["English", "none"])
async def test_the_word_search_finds_numbers_and_words_without_spaces(language: str) -> None:
    async with knowledge_world() as knowledge:
        body = {"name": "docs", "chunk_tokens": 32, "language": language}
        await knowledge.result("POST", "", body)
        lines = [f"Step {n} of the work returns E{n}04 and {n}00." for n in range(6)]
        await knowledge.add("docs", "steps.md", "\n\n".join(f"# Part\n\n{each}" for each in lines))
        await knowledge.add("docs", "tokyo.txt", "我住在东京都。")
        for query in ("3", "E304", "300"):
            best = (await knowledge.search("docs", query, mode="text"))[0]
            assert lines[3] in best["text"], query
        found = await knowledge.search("docs", "东京", mode="text")
        assert bool(found) == (language == "none")


ODD_QUERIES = (
    *('"zebra crossing"', '"zebra', '"', '""', "'zebra'", "zebra AND", "NOT zebra", "(zebra OR"),
    *("content:zebra", "zebra~2", "zebra^9", "+zebra -crossing", "zebra*", "*", "?", "\\", "/z/"),
    *("the", "…", "\0", "\ud7ff", "🦓", "[zebra TO *]", '{"match": {"content": "zebra"}}'),
)
"""Syntax of search engines, and queries without words."""


@pytest.mark.parametrize("mode", ["hybrid", "text"])
async def test_a_query_is_words_without_syntax(tmp_path: Path, mode: Mode) -> None:
    store = Store(str(tmp_path), KnowledgeConfig())
    table = await store.create("acme", "docs", BaseSettings("cls", 3, 200, "English"))
    vectors = np.ones((1, 3), np.float32)
    rows = [Row("1", 0, "The zebra crossing is closed.", 0, [], None, 0, 29)]
    await table.replace_document("a", {"id": "a"}, rows, vectors)
    for is_indexed in (False, True):
        for query in ODD_QUERIES:
            found = await table.search(query, vectors[0], mode, 10)
            assert bool(found) == ("zebra" in query or mode == "hybrid"), (is_indexed, query)
        await table.maintain(index_passages=1000)
    await store.close()


async def test_a_base_with_other_settings_is_a_conflict() -> None:
    async with knowledge_world(knowledge={"max_bases": 1}) as knowledge:
        await knowledge.result("POST", "", {"name": "docs"})
        other = await knowledge.call("POST", "", {"name": "docs", "language": "German"})
        assert (other.status, other.json()["error"]["param"]) == (422, "name")
        assert (await knowledge.call("POST", "", {"name": "second"})).status == 400


# -- bounds and bad input ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "", {"name": "Docs"}, 400),
        ("POST", "", {"name": "../x"}, 400),
        ("POST", "", {"name": "d", "model": "nothing"}, 404),
        ("POST", "", {"name": "d", "language": "Klingon"}, 400),
        ("GET", "/none", None, 404),
        ("DELETE", "/none", None, 404),
        ("GET", "/none/documents", None, 404),
        ("GET", "/docs/documents?limit=0", None, 400),
        ("GET", "/docs/documents?limit=1001", None, 400),
        ("GET", "/..", None, 400),
        ("DELETE", "/docs/documents/none", None, 404),
        ("DELETE", "/docs/documents/a' OR 'a'='a", None, 404),
        ("POST", "/docs/search", {"query": " "}, 400),
        ("POST", "/docs/search", {"query": "x", "limit": 101}, 400),
        ("POST", "/docs/search", {"query": "x" * 1001}, 413),
        ("POST", "/docs/answer", {"question": "zebra", "model": "nothing"}, 404),
        ("POST", "/docs/documents", {"file": "x"}, 400),
        ("PUT", "/docs", {}, 405),
        ("POST", "/docs/paint", {}, 404),
    ],
)
async def test_bad_requests_have_typed_errors(
    method: str, path: str, body: Any, status: int
) -> None:
    async with knowledge_world(max_chars=1000) as knowledge:
        await knowledge.result("POST", "", {"name": "docs"})
        await knowledge.add("docs", "a.txt", "The zebra crossing.")
        answer = await knowledge.call(method, path, body)
        assert answer.status == status, answer.body
        assert answer.json()["error"]["type"]
        assert (await knowledge.result("GET", "/docs"))["passages"] == 1


@pytest.mark.parametrize(
    ("filename", "content", "fields", "status"),
    [
        ("a.exe", b"MZ", {}, 400),
        ("a.txt", b"%PDF-1.7", {}, 400),
        ("a.pdf", b"plain text", {}, 400),
        ("a.docx", b"plain text", {}, 400),
        ("a.html", b"plain text", {}, 400),
        ("a.txt", b"\xff\xfe\xff", {}, 400),
        ("a.txt", b"a\0b", {}, 400),
        ("a.txt", b" \n ", {}, 400),
        ("a.txt", b"", {}, 400),
        ("a.txt", b"text", {"type": "exe"}, 400),
        ("a.txt", b"text", {"id": "/a"}, 400),
        ("a.txt", b"text", {"id": "a?b"}, 400),
        ("a.txt", b"x" * 5000, {}, 413),
        ("a.txt", b"x" * 100_000, {}, 413),
    ],
)
async def test_unusable_files_have_typed_errors(
    filename: str, content: bytes, fields: dict[str, str], status: int
) -> None:
    limits = {"max_file_bytes": 8000, "max_document_chars": 4000}
    async with knowledge_world(knowledge=limits) as knowledge:
        await knowledge.result("POST", "", {"name": "docs"})
        answer = await knowledge.upload("docs", filename, content, **fields)
        assert answer.status == status, answer.body
        assert answer.json()["error"]["type"]
        assert (await knowledge.result("GET", "/docs"))["passages"] == 0


async def test_a_base_has_a_maximum_of_passages() -> None:
    async with knowledge_world(knowledge={"max_passages": 2}) as knowledge:
        await knowledge.result("POST", "", {"name": "docs", "chunk_tokens": 32})
        assert (await knowledge.upload("docs", "rivers.md", RIVERS)).status == 413


async def test_what_users_write_is_no_template() -> None:
    async with knowledge_world(lambda messages: "ok [1]") as knowledge:
        await knowledge.result("POST", "", {"name": "docs"})
        await knowledge.add("docs", "a.txt", "$question ${passages} {0} %s zebra")
        body = {"question": "$passages zebra ${sentinel}"}
        assert (await knowledge.result("POST", "/docs/answer", body))["found"]
        prompt = knowledge.tasks.generator.bodies[-1]["messages"][-1]["content"]
        assert "$question ${passages} {0} %s zebra" in prompt
        assert "$passages zebra ${sentinel}" in prompt


async def test_a_reranker_orders_the_results() -> None:
    async with knowledge_world(knowledge={"reranker": "cls"}) as knowledge:
        await knowledge.result("POST", "", {"name": "docs", "chunk_tokens": 32})
        await knowledge.add("docs", "rivers.md", RIVERS)
        plain = await knowledge.search("docs", "Elbe", rerank=False)
        assert await knowledge.search("docs", "Elbe") == plain[::-1]
        body = {"query": "Elbe", "mode": "text"}
        for rerank, expected in ((True, True), (False, None)):
            found = await knowledge.result("POST", "/docs/search", {**body, "rerank": rerank})
            assert found["reranked"] is expected


@pytest.mark.parametrize("query", ["Elbe, no reranker", "Elbe, busy reranker"])
async def test_a_search_goes_on_if_the_reranker_fails(query: str) -> None:
    async with knowledge_world(
        lambda messages: "In the sea [1].", knowledge={"reranker": "cls"}
    ) as knowledge:
        await knowledge.result("POST", "", {"name": "docs", "chunk_tokens": 32})
        await knowledge.add("docs", "rivers.md", RIVERS)
        plain = await knowledge.search("docs", query, rerank=False)
        found = await knowledge.result("POST", "/docs/search", {"query": query})
        assert (found["reranked"], found["passages"]) == (False, plain)
        answer = await knowledge.result("POST", "/docs/answer", {"question": query})
        assert (answer["reranked"], answer["found"]) == (False, True)
        registry = Registry()
        knowledge.tasks.engine.observe(registry)
        assert registry.counter(table.KNOWLEDGE_RERANKS, "applications", "failed").value == 2


async def test_the_documents_stay_when_the_replica_restarts(tmp_path: Path) -> None:
    place = {"knowledge": {"directory": str(tmp_path)}}
    async with knowledge_world(**place) as knowledge:
        await knowledge.result("POST", "", {"name": "docs"})
        await knowledge.add("docs", "notes.txt", NOTES)
    async with knowledge_world(**place) as knowledge:
        assert await knowledge.search("docs", "zebra", mode="text")


BODIES = st.dictionaries(
    st.sampled_from(["name", "query", "question", "limit", "mode", "model", "stream", "language"]),
    json_values,
    max_size=4,
)


@settings(
    max_examples=120,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.sampled_from(["", "/docs", "/docs/documents", "/docs/search", "/docs/answer", "/d/x/y"]),
    st.sampled_from(["GET", "POST", "DELETE", "PATCH"]),
    BODIES | json_values | st.binary(max_size=40),
)
def test_any_body_gets_an_answer_or_a_typed_error(path: str, method: str, body: Any) -> None:
    async def send() -> asgi.Answer:
        engine = TaskEngine(ApplicationsConfig(encoder="cls"), NoModels(), Path("/proc/none"))
        await engine.start()
        return await asgi.call(engine.app, method, f"/v1/knowledge{path}", body)

    answer = asyncio.run(send())
    assert 400 <= answer.status < 500 or answer.status in (501, 503), answer.body
    assert answer.json()["error"]["type"]


FORM_FIELDS = st.dictionaries(
    st.sampled_from(["id", "type", "file", "x"]), st.text(max_size=20), max_size=3
)
FILES = st.tuples(
    st.sampled_from(
        ["a.txt", "a.md", "a.html", "a.pdf", "a.docx", "a", "", ".", "../a.md", "a\n.md"]
    ),
    st.binary(max_size=40) | st.text(max_size=40).map(str.encode) | st.just(b"%PDF-1.4 PK\x03\x04"),
)


@settings(max_examples=4, deadline=None, database=None, derandomize=True)
@given(
    st.lists(st.tuples(FILES, FORM_FIELDS), min_size=3, max_size=3),
    st.lists(st.tuples(st.sampled_from(["search", "answer"]), BODIES), min_size=10, max_size=10),
)
def test_any_request_to_a_base_gets_a_result_or_a_typed_error(
    uploads: list[Any], requests: list[Any]
) -> None:
    async def send() -> list[asgi.Answer]:
        async with knowledge_world() as knowledge:
            await knowledge.result("POST", "", {"name": "docs"})
            return [
                *[await knowledge.upload("docs", *file, **fields) for file, fields in uploads],
                *[await knowledge.call("POST", f"/docs/{path}", body) for path, body in requests],
            ]

    for answer in asyncio.run(send()):
        assert 200 <= answer.status < 500, answer.body
        if answer.status != 200:
            assert answer.json()["error"]["type"]
