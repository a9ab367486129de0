"""Transcripts of the client: ``Tandem`` inherits these methods."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

from cluster.client import wire
from cluster.client.results import Transcript, TranscriptSegment
from cluster.client.session import Session

TRANSCRIPTIONS = "/v1/audio/transcriptions"
TRANSLATIONS = "/v1/audio/translations"

AudioFile = str | Path | bytes
"""Path of an audio file, or its content."""


class SpeechMethods:
    """Methods for ``/v1/audio/…``.

    ``options`` are further fields of the form: ``model``, ``language``, ``prompt``, ``temperature``
    and others.
    """

    _session: Session

    def transcribe(self, file: AudioFile, *, segments: bool = False, **options: Any) -> Transcript:
        """Transcribe a recording; ``segments`` adds the times of its parts."""
        return self._session.wait_for(self.atranscribe(file, segments=segments, **options))

    async def atranscribe(
        self, file: AudioFile, *, segments: bool = False, **options: Any
    ) -> Transcript:
        return await self._transcript(TRANSCRIPTIONS, file, segments, options)

    def translate_speech(
        self, file: AudioFile, *, segments: bool = False, **options: Any
    ) -> Transcript:
        """Translate a recording into English text; ``segments`` as in ``transcribe``."""
        return self._session.wait_for(self.atranslate_speech(file, segments=segments, **options))

    async def atranslate_speech(
        self, file: AudioFile, *, segments: bool = False, **options: Any
    ) -> Transcript:
        return await self._transcript(TRANSLATIONS, file, segments, options)

    def subtitles(
        self, file: AudioFile, *, format: Literal["srt", "vtt"] = "srt", **options: Any
    ) -> str:
        """Transcribe a recording into subtitles."""
        return self._session.wait_for(self.asubtitles(file, format=format, **options))

    async def asubtitles(
        self, file: AudioFile, *, format: Literal["srt", "vtt"] = "srt", **options: Any
    ) -> str:
        form = await _form(file, {**options, "response_format": format})
        request = wire.ApiRequest(
            TRANSCRIPTIONS, None, lambda content: [content.decode()], form=form, is_file=True
        )
        text: str = (await self._session.run([request]))[0]
        return text

    def stream_transcript(self, file: AudioFile, **options: Any) -> Iterator[str]:
        """Transcribe a recording and yield the pieces as the model generates them."""
        yield from self._session.iterate(self._pieces(file, options))

    async def astream_transcript(self, file: AudioFile, **options: Any) -> AsyncIterator[str]:
        async with aclosing(self._pieces(file, options)) as batches:
            async for pieces in batches:
                for piece in pieces:
                    yield piece

    async def _pieces(
        self, file: AudioFile, options: Mapping[str, Any]
    ) -> AsyncGenerator[list[str], None]:
        content_type, body = wire.form(await _form(file, {**options, "stream": "true"}))
        headers = [(b"content-type", content_type)]
        reader = wire.EventReader(_pieces_of)
        batches = self._session.batches(TRANSCRIPTIONS, body, reader, headers)
        async with aclosing(batches):
            async for pieces in batches:
                yield pieces

    async def _transcript(
        self, path: str, file: AudioFile, segments: bool, options: Mapping[str, Any]
    ) -> Transcript:
        response_format = "verbose_json" if segments else "json"
        form = await _form(file, {"response_format": response_format, **options})
        request = wire.ApiRequest(path, None, _transcripts, form=form)
        found: Transcript = (await self._session.run([request]))[0]
        return found


async def _form(file: AudioFile, fields: Mapping[str, Any]) -> wire.Upload:
    texts = {name: str(value) for name, value in fields.items() if value is not None}
    if isinstance(file, bytes):
        return wire.Upload(file, "audio", texts)
    path = Path(file)
    return wire.Upload(await asyncio.to_thread(path.read_bytes), path.name, texts)


def _pieces_of(event: Mapping[str, Any]) -> Iterator[str]:
    if event.get("type") == "transcript.text.delta" and event["delta"]:
        yield event["delta"]


def _transcripts(answer: Mapping[str, Any]) -> list[Transcript]:
    segments = tuple(
        TranscriptSegment(one["text"].strip(), one["start"], one["end"])
        for one in answer.get("segments") or ()
    )
    return [Transcript(answer["text"], answer.get("language"), answer.get("duration"), segments)]
