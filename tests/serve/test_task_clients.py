"""Typed tasks from ``cluster.client`` and the command line."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.client import Tandem
from cluster.errors import InvalidRequestError
from cluster.tasks import SummarizeResult
from tests.serve.task_kit import task_world
from tests.serve.test_cli_http import FakeRouter, run
from tests.serve.test_cli_http import router as router

USAGE = {"calls": 1}
FIELDS = {"id": "i", "model": "m", "usage": USAGE}


async def test_the_client_calls_and_streams_tasks() -> None:
    async with task_world(lambda messages: "Good day [1].") as tasks:
        client = Tandem()
        client._session = tasks.session
        translated = await client.atranslate("Guten Tag.", "en", source="de")
        assert (translated.translation, translated.usage.calls) == ("Good day [1].", 1)
        answered = await client.aanswer("Which day is it?", ["The day is good."])
        assert answered.citations[0].document == "0"
        assert (await client.asentiment(["good"])).results[0].label == "positive"
        labeled = await client.alabel(["aab"], ["a", "c"], method="encoder")
        assert labeled.results[0].label == "a"
        items = [item async for item in client.astream_task("summarize", text="Hello")]
        assert items[:-1] == ["Good ", "day ", "[1]."]
        assert isinstance(items[-1], SummarizeResult)
        assert items[-1].summary == "Good day [1]."
        with pytest.raises(InvalidRequestError, match="text") as raised:
            await client.asummarize(" ")
        assert raised.value.param == "text"
        with pytest.raises(InvalidRequestError):
            [item async for item in client.astream_task("summarize", text=" ")]


async def test_the_client_calls_tasks_synchronously() -> None:
    async with task_world(lambda messages: '{"a": 1}') as tasks:
        client = Tandem()
        client._session = tasks.session

        def work() -> tuple[Any, list[Any]]:
            try:
                schema = {"type": "object"}
                return client.extract("1", schema).data, list(
                    client.stream_task("summarize", text="Hello")
                )
            finally:
                client.close()

        data, items = await asyncio.to_thread(work)
        assert data == {"a": 1}
        assert items[-1].summary == '{"a": 1}'


def test_the_command_line_streams_text_and_prints_sources(router: FakeRouter) -> None:
    citation = {"number": 1, "document": "a.txt", "start": 0, "end": 5, "text": "x", "score": 1.0}
    result = {**FIELDS, "found": True, "citations": [citation]}
    events = [{"delta": "Yes "}, {"delta": "[1]."}, {"result": result}]
    router.answer = lambda path, body: (200, events)
    done = run("tasks", "summarize", "--url", router.url, "--length", "short", stdin="Hello")
    assert (done.exit_code, done.output) == (0, "Yes [1].\n[1] a.txt:0-5\n")
    path, body = router.requests[0]
    assert path == "/v1/tasks/summarize"
    assert (body["text"], body["length"], body["stream"]) == ("Hello", "short", True)
    assert "model" not in body


def test_the_command_line_sends_the_fields_of_each_task(router: FakeRouter, tmp_path: Path) -> None:
    row = {"label": "pos", "score": 0.9, "scores": [], "aspects": {"price": "absent"}}
    router.answer = lambda path, body: (
        200,
        {**FIELDS, "data": {"a": 1}, "results": [row], "translation": "Tag"},
    )
    (tmp_path / "s.json").write_text('{"type": "object"}')
    (tmp_path / "t.txt").write_text("Text")
    file, url = str(tmp_path / "t.txt"), ("--url", router.url)
    translate = ("--to", "de", "--term", "a=b", "--markdown", "--json")
    assert run("tasks", "translate", file, *translate, *url).exit_code == 0
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "t.txt").write_text("Other")
    files = file, str(tmp_path / "sub" / "t.txt")
    assert run("tasks", "answer", "Why?", *files, "--json", *url).exit_code == 0
    documents = router.requests[-1][1]["documents"]
    assert [each["id"] for each in documents] == list(files)
    assert run("tasks", "answer", "Why?", file, "--json", *url).exit_code == 0
    extracted = run("tasks", "extract", file, "--schema", str(tmp_path / "s.json"), *url)
    assert json.loads(extracted.output) == {"a": 1}
    shown = run("tasks", "sentiment", "good", "--aspect", "price", *url)
    assert "price=absent" in shown.output
    assert run("tasks", "classify", "x", "--label", "a", "--label", "b", *url).exit_code == 0
    bodies = dict(router.requests)
    assert bodies["/v1/tasks/translate"]["glossary"] == {"a": "b"}
    assert bodies["/v1/tasks/translate"]["format"] == "markdown"
    assert bodies["/v1/tasks/answer"]["documents"] == [{"id": "t.txt", "text": "Text"}]
    assert bodies["/v1/tasks/sentiment"]["aspects"] == ["price"]
    assert bodies["/v1/tasks/classify"]["labels"] == ["a", "b"]
    wrong = run("tasks", "translate", file, "--to", "de", "--term", "a", *url)
    assert "TERM=TRANSLATION" in str(wrong.exception)
