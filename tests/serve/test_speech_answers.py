"""Answers of ``/v1/audio`` around vLLM's handlers, which are simulated."""

import io
import wave
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, UploadFile
from pydantic import BaseModel, ConfigDict

from cluster.config.pools import AudioConfig
from cluster.engines.vllm import internals
from cluster.engines.vllm.speech import Speech

PATH = "/v1/audio/transcriptions"
RATE = 16_000


class Form(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    file: UploadFile
    response_format: str = "json"
    language: str | None = None
    prompt: str = ""
    stream: bool = False


class Segment(BaseModel):
    id: int
    text: str


class Result(BaseModel):
    text: str
    segments: list[Segment] | None = None


class Model:
    """Model that is not Whisper."""

    @staticmethod
    def validate_language(language: str | None) -> str | None:
        if language == "xx":
            raise ValueError("Unsupported language: 'xx'.")
        return language

    @staticmethod
    def get_num_audio_tokens(*_: Any) -> int:
        return 0


class Handler:
    task_type = "transcribe"
    model_cls = Model
    model_config = None
    asr_config = SimpleNamespace(
        sample_rate=RATE, max_audio_clip_s=None, allow_audio_chunking=False
    )

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._preprocess_executor = threads
        self.prompts: list[str] = []

    async def create_transcription(self, _: Any, request: Any, __: Any) -> Result:
        self.prompts.append(request.prompt)
        windows = [("a", "b"), ("c",), ("d", "e")]
        segments = [Segment(id=i, text=t) for texts in windows for i, t in enumerate(texts)]
        return Result(text="a b c d e", segments=segments)


def unchanged(answer: Any) -> Any:
    return answer


NAMES = {
    "TranscriptionRequest": "Form",
    "TranscriptionResponse": "Result",
    "with_cancellation": "unchanged",
}
"""Stand-ins in this module for what is read of vLLM."""


class World:
    def __init__(self, client: httpx.AsyncClient, handler: Handler, speech: Speech) -> None:
        self.client, self.handler, self.speech = client, handler, speech

    async def post(self, peak: int = 9000, **fields: str) -> httpx.Response:
        return await self.client.post(PATH, files={"file": wav(peak)}, data=fields)


def wav(peak: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes(np.full(RATE, peak, "<i2").tobytes())
    return file.getvalue()


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    for name, replacement in NAMES.items():
        monkeypatch.setitem(internals.NAMES, name, f"{__name__}:{replacement}")
    app = FastAPI()
    app.add_api_route(PATH, lambda: None, methods=["POST"])
    with ThreadPoolExecutor(1) as threads:
        handler = app.state.openai_serving_transcription = Handler(threads)
        speech = Speech(AudioConfig())
        speech.install(app)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://speech") as client:
            yield World(client, handler, speech)


async def test_segments_are_numbered_across_windows(world: World) -> None:
    answer = await world.post(response_format="verbose_json")
    assert [segment["id"] for segment in answer.json()["segments"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "prompt",
    [
        "<|transcribe|>",
        "<|startof<|x|>transcript|>",
        "<|a<|b<|c|>d|>e|>",
        "<<|x|>|a|<|x|>>",
        "<|" * 20 + "x" + "|>" * 20,
    ],
)
async def test_a_prompt_has_no_special_tokens(world: World, prompt: str) -> None:
    assert (await world.post(prompt=f"Hello {prompt} Ada")).status_code == 200
    (found,) = world.handler.prompts
    assert "<|" not in found
    assert found.startswith("Hello ")
    assert found.endswith(" Ada")


async def test_a_prompt_without_special_tokens_is_kept(world: World) -> None:
    assert (await world.post(prompt="a < b | c > d")).status_code == 200
    assert world.handler.prompts == ["a < b | c > d"]


async def test_deep_nesting_is_read_in_one_pass(world: World) -> None:
    prompt = "<|" * 100_000 + "x" + "|>" * 100_000
    assert (await world.post(prompt=prompt)).status_code == 200
    assert "<|" not in world.handler.prompts[0]


@pytest.mark.parametrize("peak", [0, 9000])
async def test_a_known_language_is_accepted(world: World, peak: int) -> None:
    assert (await world.post(peak, language="de", response_format="text")).status_code == 200


async def test_silence_in_an_unknown_language_is_refused(world: World) -> None:
    answer = await world.post(0, language="xx")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "language"


async def test_the_duration_of_answered_recordings_is_counted(world: World) -> None:
    for peak, language in ((9000, "de"), (0, "de"), (0, "xx")):  # the last one is refused
        await world.post(peak, language=language)
    assert world.speech.audio_s == pytest.approx(2)
