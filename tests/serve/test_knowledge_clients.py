"""Knowledge bases from ``cluster.client`` and the command line."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from cluster.client import Tandem
from cluster.errors import DataError, InvalidRequestError, NotFoundError
from cluster.gateway import GatewayApp
from cluster.tasks.knowledge import KnowledgeAnswer
from tests.serve.task_kit import TaskWorld, task_world
from tests.serve.test_cli_http import run
from tests.serve.test_knowledge import NOTES, RIVERS


async def test_the_client_adds_searches_and_answers(tmp_path: Path) -> None:
    file = tmp_path / "rivers.md"
    file.write_text(RIVERS)
    async with task_world(lambda messages: "In the North Sea [1].") as tasks:
        client = Tandem()
        client._session = tasks.session
        base = client.knowledge("docs")
        assert (await base.acreate(chunk_tokens=32)).passages == 0
        assert (await base.aadd(file)).embedded == 3
        added = await base.aadd_bytes(NOTES.encode(), id='dir/a "b" ü.txt')
        assert (added.document.id, added.document.type) == ('dir/a "b" ü.txt', "text")
        assert [each.id for each in await base.adocuments()] == [added.document.id, "rivers.md"]
        found = await base.asearch("Cuxhaven", limit=1, mode="text")
        assert found.passages[0].heading == ["Rivers", "Mouth"]
        answered = await base.aanswer("Where does the Elbe end?")
        assert answered.citations[0].document == "rivers.md"
        items = [item async for item in base.astream_answer("Where does the Elbe end?")]
        assert items[:-1] == ["In ", "the ", "North ", "Sea ", "[1]."]
        assert isinstance(items[-1], KnowledgeAnswer)
        await base.aremove(added.document.id)
        assert (await base.adescribe()).passages == 3
        with pytest.raises(InvalidRequestError):
            await base.aremove("a?b")
        assert [each.name for each in await client.aknowledge_bases()] == ["docs"]
        await base.adelete()
        with pytest.raises(NotFoundError):
            await base.asearch("Elbe")


async def test_the_client_works_synchronously() -> None:
    async with task_world(lambda messages: "Nine [1].") as tasks:
        client = Tandem()
        client._session = tasks.session

        def work() -> list[Any]:
            try:
                base = client.knowledge("docs")
                base.create()
                base.add_bytes(NOTES.encode(), id="a.txt")
                return list(base.stream_answer("When does the harbour open?"))
            finally:
                client.close()

        items = await asyncio.to_thread(work)
        assert items[:-1] == ["Nine ", "[1]."]
        assert items[-1].found


@asynccontextmanager
async def http_server(tasks: TaskWorld) -> AsyncIterator[str]:
    """Serve the router over HTTP, and yield its URL."""
    app: Any = GatewayApp(tasks.world.gateway)
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="warning"))
    task = asyncio.create_task(server.serve())
    try:
        while not server.started:  # noqa: ASYNC110, uvicorn has no event
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


async def test_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "rivers.md").write_text(RIVERS)
    (tmp_path / "notes.txt").write_text(NOTES)
    (tmp_path / "skipped.bin").write_bytes(b"\0")
    async with (
        task_world(lambda messages: "In the North Sea [1].") as tasks,
        http_server(tasks) as url,
    ):

        async def kb(*args: str) -> Any:
            return await asyncio.to_thread(run, "kb", *args, "--url", url)

        created = await kb("create", "docs", "--chunk-tokens", "32")
        assert created.output == "docs: embedded by cls, 0 passages\n"
        added = await kb("add", "docs", str(tmp_path))
        assert added.output.splitlines() == [
            "notes.txt: 1 embedded, 0 kept, 0 removed",
            "sub/rivers.md: 3 embedded, 0 kept, 0 removed",
        ]
        failed = await kb("add", "docs", str(tmp_path / "skipped.bin"))
        assert isinstance(failed.exception, DataError)
        assert "skipped.bin: not added: The type" in failed.output
        missing = await kb("add", "docs", str(tmp_path / "missing.md"))
        assert missing.output == "missing.md: not added: No such file or directory\n"
        listed = await kb("list", "docs")
        assert listed.output.split()[4:8] == ["notes.txt", "text", "1", str(len(NOTES))]
        assert (await kb("list")).output.split() == [
            *("NAME", "MODEL", "LANGUAGE"),
            *("docs", "cls", "English"),
        ]
        found = await kb("search", "docs", "Cuxhaven", "--mode", "text")
        assert "sub/rivers.md:" in found.output
        assert "Rivers > Mouth" in found.output
        answered = await kb("answer", "docs", "Where does the Elbe end?")
        assert answered.output.startswith("In the North Sea [1].\n[1] sub/rivers.md:")
        unknown = await kb("answer", "docs", "Who wrote Faust?", "--threshold", "1")
        assert unknown.output == "Not in the documents.\n"
        as_json = await kb("answer", "docs", "Who wrote Faust?", "--threshold", "1", "--json")
        assert json.loads(as_json.output)["found"] is False
        assert (await kb("remove", "docs", "sub/rivers.md")).output == "deleted sub/rivers.md\n"
        assert (await kb("remove", "docs")).output == "deleted docs\n"
