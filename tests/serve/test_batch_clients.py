"""``tandem batch`` and OpenAI's client against a router over HTTP."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from typer.testing import CliRunner

from cluster.batches import Batch, open_store
from cluster.cli.app import app
from cluster.cli.router_client import RouterClient
from cluster.client import Tandem
from cluster.client.session import Session
from cluster.errors import InvalidRequestError
from cluster.gateway import GatewayApp
from tests.serve.gateway_kit import CHAT, World, gateway_world
from tests.serve.test_client_transport import FakeHandle

EMBEDDINGS = "/v1/embeddings"


@asynccontextmanager
async def served(tmp_path: Path, **router: Any) -> AsyncIterator[tuple[World, str]]:
    """Yield a gateway with batches, and its URL."""
    async with gateway_world(batch_store=open_store(tmp_path / "store"), **router) as world:
        await world.add("gen", "gen-1")
        await world.add("cls", "cls-1")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server = uvicorn.Server(uvicorn.Config(world.app, log_level="error", lifespan="off"))
            task = asyncio.create_task(server.serve([listener]))
            yield world, f"http://127.0.0.1:{listener.getsockname()[1]}"
            server.should_exit = True
            await task


def lines(number: int, url: str, model: str, size: int = 0) -> bytes:
    bodies = ({"model": model, "input": "x" * size, "prompt_tokens": 2} for _ in range(number))
    requests = (
        {"custom_id": str(index), "method": "POST", "url": url, "body": body}
        for index, body in enumerate(bodies)
    )
    return b"\n".join(json.dumps(each).encode() for each in requests)


async def tandem(*args: str) -> Any:
    return await asyncio.to_thread(CliRunner().invoke, app, ["batch", *args])


async def test_a_file_is_submitted_followed_and_fetched(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(lines(3, CHAT, "gen"))
    async with served(tmp_path) as (_, url):
        done = await tandem("submit", str(file), "--wait", "--url", url)
        assert done.exit_code == 0, done.output
        id_ = done.stdout.split()[0]
        shown = await tandem("status", "--url", url)
        assert shown.stdout == f"{id_}  completed  3 of 3 lines, 0 failed, 6 tokens\n"
        found = json.loads((await tandem("status", id_, "--json", "--url", url)).stdout)
        assert found["id"] == id_
        out = tmp_path / "out.jsonl"
        await tandem("results", id_, "--out", str(out), "--url", url)
        answers = [json.loads(each) for each in out.read_text().splitlines()]
        assert {each["custom_id"] for each in answers} == {"0", "1", "2"}
        missing = await tandem("results", id_, "--errors", "--url", url)
        assert "it has no error file" in str(missing.exception)
        assert "cannot be cancelled" in str((await tandem("cancel", id_, "--url", url)).exception)


def test_a_lost_connection_does_not_end_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.cli.batch.POLL_S", 0.0)
    num_asked = 0

    def respond(request: httpx.Request) -> httpx.Response:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 1:
            raise httpx.RemoteProtocolError("server disconnected", request=request)
        if num_asked == 2:
            raise httpx.ReadError("reset", request=request)
        batch = Batch("b", "", CHAT, "in", "24h", 0, 9, "out", "err", status="completed")
        return httpx.Response(200, json=batch.as_json(None))

    @contextmanager
    def connect(url: str, key: str | None) -> Iterator[RouterClient]:
        client = httpx.Client(base_url=url, transport=httpx.MockTransport(respond))
        with client:
            yield RouterClient(url, client)

    monkeypatch.setattr("cluster.cli.batch.connect", connect)
    done = CliRunner().invoke(app, ["batch", "status", "b", "--wait", "--url", "http://127.0.0.1"])
    assert done.exit_code == 0, done.output
    assert num_asked == 3


async def test_a_file_with_bad_lines_fails_with_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(lines(1, CHAT, "gen") + b"\n{}")
    async with served(tmp_path) as (_, url):
        done = await tandem("submit", str(file), "--wait", "--url", url)
        assert "failed  0 of" in str(done.exception)
        shown = await tandem("status", done.stdout.split()[0], "--url", url)
        assert "line 2: invalid_request" in shown.stdout


def test_a_file_that_cannot_be_submitted_is_named(tmp_path: Path) -> None:
    missing, wrong = tmp_path / "missing.jsonl", tmp_path / "wrong.jsonl"
    wrong.write_text("[]\n")
    for file, problem in ((missing, "No such file or directory"), (wrong, "line 1 must be")):
        done = CliRunner().invoke(app, ["batch", "submit", str(file)])
        assert f"{file}: " in str(done.exception)
        assert problem in str(done.exception)


async def test_openais_client_works_unchanged(tmp_path: Path) -> None:
    content = lines(4, EMBEDDINGS, "cls", size=1_000_000)
    async with served(tmp_path) as (world, url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            file = await client.files.create(file=("in.jsonl", content), purpose="batch")
            assert (file.bytes, file.filename) == (len(content), "in.jsonl")
            created = await client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/embeddings",
                completion_window="24h",
                metadata={"owner": "me"},
            )
            async with asyncio.timeout(60):
                while True:
                    batch = await client.batches.retrieve(created.id)
                    if batch.status == "completed":
                        break
                    await asyncio.sleep(0.05)
            assert batch.request_counts is not None
            assert batch.request_counts.completed == 4
            assert batch.usage is not None
            assert batch.usage.input_tokens == 8
            assert batch.output_file_id is not None
            output = await client.files.content(batch.output_file_id)
            assert len(output.text.splitlines()) == 4
            assert [each.id async for each in client.batches.list()] == [batch.id]
            listed = [each.id async for each in client.files.list(limit=1)]
            assert set(listed) == {file.id, batch.output_file_id}
            assert (await client.files.content(file.id)).content == content
            assert (await client.files.delete(file.id)).deleted
            with pytest.raises(openai.NotFoundError, match=file.id):
                await client.batches.create(
                    input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
                )
        assert not world.gateway.buffers.used_bytes  # no upload was buffered


async def test_the_client_of_ray_jobs_runs_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path) as (world, _):
        handle: Any = FakeHandle(GatewayApp(world.gateway, authenticates=False), [])
        monkeypatch.setattr(Session, "_router", handle)
        tandem = Tandem()
        requests = [json.loads(each) for each in lines(3, CHAT, "gen", size=100_000).splitlines()]
        state = await tandem.asubmit_batch(requests)
        async with asyncio.timeout(60):
            while not state.has_ended:
                await asyncio.sleep(0.05)
                state = await tandem.abatch(state.id)
        assert (state.status, state.num_lines, state.num_completed) == ("completed", 3, 3)
        results = await tandem.abatch_results(state.id)
        assert {result["custom_id"] for result in results} == {"0", "1", "2"}
        with pytest.raises(InvalidRequestError, match="cannot be cancelled"):
            await tandem.acancel_batch(state.id)
        failed = await tandem.asubmit_batch([{**requests[0], "method": "GET"}])
        async with asyncio.timeout(60):
            while not failed.has_ended:
                await asyncio.sleep(0.05)
                failed = await tandem.abatch(failed.id)
        assert failed.errors == ("line 1: method must be POST.",)
        await tandem.aclose()
