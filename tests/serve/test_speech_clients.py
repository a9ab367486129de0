"""Transcripts from ``cluster.client`` and the command line, from a scripted speech model."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from cluster.asgi import Receive, Scope, Send
from cluster.client import Tandem
from cluster.client.results import Transcript, TranscriptSegment
from cluster.client.speech import TRANSCRIPTIONS, TRANSLATIONS
from cluster.errors import DataError, InvalidRequestError
from tests.serve.task_kit import TaskWorld, task_world
from tests.serve.test_cli_http import run
from tests.serve.test_knowledge_clients import http_server

AUDIO = b"RIFF}\r\n--audio"
SEGMENTS = [{"text": " Good morning.", "start": 0.0, "end": 1.5}]


class Transcriber:
    """Answers as ``cluster.engines.vllm.speech`` does; keeps the forms."""

    def __init__(self) -> None:
        self.forms: list[dict[str, str]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with Request(scope, receive).form() as form:
            assert await form["file"].read() == AUDIO  # type: ignore[union-attr]
            fields = {name: str(value) for name, value in form.items() if name != "file"}
        self.forms.append(fields)
        response = self._answer(scope["path"], fields)
        await response(scope, receive, send)

    @staticmethod
    def _answer(path: str, fields: dict[str, str]) -> Response:
        text = "Translated." if path == TRANSLATIONS else "Good morning."
        if fields.get("language") == "de":
            error = {"message": "English only", "param": "language", "code": 400}
            return JSONResponse({"error": error}, 400)
        if fields.get("stream") == "true":
            deltas = [{"type": "transcript.text.delta", "delta": f"{w} "} for w in text.split()]
            events = [*deltas, {"type": "transcript.text.done", "text": text}]
            lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
            return PlainTextResponse(f"{lines}data: [DONE]\n\n", media_type="text/event-stream")
        match fields.get("response_format"):
            case "srt" | "vtt" | "text":
                return PlainTextResponse(f"as {fields['response_format']}\n")
            case "verbose_json":
                found = {"text": text, "language": "en", "duration": 2.0, "segments": SEGMENTS}
                return JSONResponse(found)
        return JSONResponse({"text": text, "usage": {"type": "duration", "seconds": 2}})


@asynccontextmanager
async def speech_world() -> AsyncIterator[tuple[TaskWorld, Transcriber]]:
    async with task_world() as tasks:
        transcriber = Transcriber()
        await tasks.world.serve(transcriber, "gen", "speech-1", (TRANSCRIPTIONS, TRANSLATIONS))
        tasks.world.remove("gen", "gen-1")
        yield tasks, transcriber


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    file = tmp_path / "speech.wav"
    file.write_bytes(AUDIO)
    return file


async def test_the_client_transcribes(audio: Path) -> None:
    async with speech_world() as (tasks, transcriber):
        client = Tandem()
        client._session = tasks.session
        assert await client.atranscribe(audio, model="gen") == Transcript("Good morning.")
        assert transcriber.forms[-1] == {"model": "gen", "response_format": "json"}
        timed = await client.atranscribe(AUDIO, segments=True, language="en")
        assert timed.segments == (TranscriptSegment("Good morning.", 0.0, 1.5),)
        assert (timed.language, timed.duration_s) == ("en", 2.0)
        assert (await client.atranslate_speech(str(audio))).text == "Translated."
        assert await client.asubtitles(audio, format="vtt") == "as vtt\n"
        pieces = [piece async for piece in client.astream_transcript(audio)]
        assert pieces == ["Good ", "morning. "]
        with pytest.raises(InvalidRequestError, match="English only"):
            await client.atranscribe(audio, language="de")
        with pytest.raises(FileNotFoundError):
            await client.atranscribe(audio.with_name("none.wav"))


async def test_the_client_works_synchronously(audio: Path) -> None:
    async with speech_world() as (tasks, _):
        client = Tandem()
        client._session = tasks.session

        def work() -> list[Any]:
            try:
                streamed = list(client.stream_transcript(audio))
                return [client.transcribe(audio).text, client.subtitles(audio), streamed]
            finally:
                client.close()

        found = await asyncio.to_thread(work)
        assert found == ["Good morning.", "as srt\n", ["Good ", "morning. "]]


async def test_the_command_line(audio: Path) -> None:
    async with speech_world() as (tasks, transcriber), http_server(tasks) as url:

        async def transcribe(*args: str) -> Any:
            return await asyncio.to_thread(run, "transcribe", *args, "--url", url)

        assert (await transcribe(str(audio), "--model", "gen")).output == "Good morning. \n"
        assert transcriber.forms[-1]["model"] == "gen"
        srt = await transcribe(str(audio), "--format", "srt", "--prompt", "Names")
        assert srt.output == "as srt\n"
        assert transcriber.forms[-1] == {"response_format": "srt", "prompt": "Names"}
        as_json = await transcribe(str(audio), "--format", "json", "--translate")
        assert json.loads(as_json.output)["text"] == "Translated."
        refused = await transcribe(str(audio), "--language", "de")
        assert isinstance(refused.exception, InvalidRequestError)
        missing = await transcribe(str(audio.with_name("none.wav")))
        assert isinstance(missing.exception, DataError)
        assert "No such file" in str(missing.exception)
