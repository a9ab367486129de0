"""``/v1/audio``: transcripts and translations of recordings, in the formats of OpenAI.

vLLM's handlers generate. Around them are decoding (``audio``), the limits of a request, the formats
of subtitles, OpenAI's events of streams, and prompts for models that know English only.
"""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import msgspec

from cluster.config.pools import AudioConfig
from cluster.engines.vllm import internals, transcripts
from cluster.engines.vllm.audio import Audio, decode
from cluster.engines.vllm.requests import add_prompt_tokens
from cluster.errors import InvalidRequestError, PayloadTooLargeError, RequestError

PATHS = {
    "/v1/audio/transcriptions": ("openai_serving_transcription", "TranscriptionRequest"),
    "/v1/audio/translations": ("openai_serving_translation", "TranslationRequest"),
}
"""Attribute of the application's state, and type of the form, by path."""
RESPONSE_FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
MULTILINGUAL_TOKENS = 51_865
"""Smallest vocabulary of a Whisper model that knows several languages."""
MAX_PROMPT_TOKENS = 223
"""Part of a prompt that Whisper reads, its end: half of its context."""
_SUBTITLES = {"srt": ("text/plain", transcripts.srt), "vtt": ("text/vtt", transcripts.vtt)}
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>]*\|>")
_DATA = b"data: "
_DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class _Recording:
    """Recording of the current request, in windows of the model."""

    audio: Audio
    windows: list[Any]

    def window_s(self, start_s: float) -> float:
        """Return the length of the window that begins at a time."""
        position = 0
        for window in self.windows:
            if position >= round(start_s * self.audio.rate):
                return len(window) / self.audio.rate
            position += len(window)
        return 0.0


_recording: ContextVar[_Recording] = ContextVar("recording")


class Speech:
    """Handlers of ``PATHS`` in vLLM's application.

    Args:
        config: Limits of a recording.
    """

    def __init__(self, config: AudioConfig) -> None:
        self.config = config
        self.audio_s = 0.0
        """Duration of all recordings that were answered, in seconds."""

    def install(self, app: Any) -> None:
        """Replace vLLM's routes, if the model has them."""
        for route in list(app.router.routes):
            state, form = PATHS.get(route.path, ("", ""))
            handler = getattr(app.state, state, None) if state else None
            if handler is None:
                continue
            _adapt(handler)
            app.router.routes.remove(route)
            app.add_api_route(route.path, self._endpoint(handler, form), methods=["POST"])

    def _endpoint(self, handler: Any, form: str) -> Callable[..., Any]:
        from fastapi import Form, Request
        from starlette.responses import JSONResponse

        async def answer(request: Any, raw_request: Any) -> Any:
            try:
                return await self._answer(handler, request, raw_request)
            except RequestError as error:
                return JSONResponse(error.body(), error.status)

        answer.__annotations__["request"] = Annotated[getattr(internals, form), Form()]
        answer.__annotations__["raw_request"] = Request
        return internals.with_cancellation(answer)  # type: ignore[no-any-return]

    async def _answer(self, handler: Any, request: Any, raw_request: Any) -> Any:
        from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

        wanted = request.response_format
        _check_fields(request)
        content = await self._read(request.file)
        recording = await self._decode(handler, content)
        _recording.set(recording)
        create, answer_type = _create(handler)
        subtitles = _SUBTITLES.get(wanted)
        if subtitles is not None:
            request.response_format = "verbose_json"
        if recording.audio.is_silent:
            _validate_language(handler, request)
            result = _silence(answer_type, recording, request)
        else:
            result = await create(recording, request, raw_request)
            if hasattr(result, "error"):
                return JSONResponse(result.model_dump(), result.error.code)
            add_prompt_tokens(_audio_tokens(handler, recording))
        self.audio_s += recording.audio.duration_s
        if hasattr(result, "__aiter__"):
            events = _openai_events(result, recording.audio.duration_s)
            return StreamingResponse(events, media_type="text/event-stream")
        _number_segments(result)
        if subtitles is not None:
            media_type, write = subtitles
            return PlainTextResponse(write(result.segments or ()), media_type=media_type)
        text = " ".join(result.text.split())  # segments begin with a space, and so do windows
        if wanted == "text":
            return PlainTextResponse(f"{text}\n")
        return JSONResponse({**result.model_dump(), "text": text})

    async def _read(self, file: Any) -> bytes:
        limit = self.config.max_file_bytes
        content: bytes = await file.read(limit + 1)
        if len(content) > limit:
            raise PayloadTooLargeError(
                f"The audio file is larger than {limit} bytes (`audio.max_file_bytes` of the "
                "model). Split or compress it.",
                param="file",
            )
        return content

    async def _decode(self, handler: Any, content: bytes) -> _Recording:
        limit_s = self.config.max_duration_s

        def decode_and_split() -> _Recording:
            audio = decode(content, int(handler.asr_config.sample_rate), limit_s)
            return _Recording(audio, _split(audio, handler.asr_config))

        loop = asyncio.get_running_loop()  # the threads limit the recordings that are decoded
        return await loop.run_in_executor(handler._preprocess_executor, decode_and_split)


def _check_fields(request: Any) -> None:
    if request.response_format not in RESPONSE_FORMATS:
        raise InvalidRequestError(
            f"`response_format` must be one of {', '.join(RESPONSE_FORMATS)}.",
            param="response_format",
        )
    if request.stream and request.response_format not in ("json", "text"):
        raise InvalidRequestError(
            f"`{request.response_format}` cannot be streamed; stream `json`, which is text.",
            param="stream",
        )
    if "word" in (getattr(request, "timestamp_granularities", None) or ()):
        raise InvalidRequestError(
            "Times of words are not supported; use `segment`.", param="timestamp_granularities"
        )
    if getattr(request, "use_beam_search", False):
        raise InvalidRequestError("Beam search is not supported.", param="use_beam_search")
    request.language = request.language or None  # an empty field of a form
    # The prompt is text: it must not end the prompt, or choose the task.
    if getattr(request, "prompt", None):
        # Removal may join the rest to a token, whose start is then taken apart.
        request.prompt = _SPECIAL_TOKEN.sub("", request.prompt).replace("<|", "< |")


def _validate_language(handler: Any, request: Any) -> None:
    try:
        request.language = handler.model_cls.validate_language(request.language)
    except ValueError as error:
        raise InvalidRequestError(str(error), param="language") from None


def _number_segments(result: Any) -> None:
    """Give the segments ids across windows; vLLM begins again in each."""
    for index, segment in enumerate(getattr(result, "segments", None) or ()):
        segment.id = index


def _split(audio: Audio, config: Any) -> list[Any]:
    clip_s = config.max_audio_clip_s
    if not config.allow_audio_chunking or clip_s is None or audio.duration_s <= clip_s:
        return [audio.samples]
    windows: list[Any] = internals.split_audio(
        audio_data=audio.samples,
        sample_rate=audio.rate,
        max_clip_duration_s=clip_s,
        overlap_duration_s=config.overlap_chunk_second,
        min_energy_window_size=config.min_energy_split_window_size,
    )
    return windows


def _create(handler: Any) -> tuple[Any, Literal["Transcription", "Translation"]]:
    if handler.task_type == "transcribe":
        return handler.create_transcription, "Transcription"
    return handler.create_translation, "Translation"


def _audio_tokens(handler: Any, recording: _Recording) -> int:
    count = handler.model_cls.get_num_audio_tokens(
        recording.audio.duration_s, handler.asr_config, handler.model_config
    )
    return int(count or 0)


def _silence(answer: str, recording: _Recording, request: Any) -> Any:
    """Return the answer to a recording without sound, in which the model would invent words."""
    duration_s = recording.audio.duration_s
    if request.stream:
        return _no_events()
    if request.response_format == "verbose_json":
        kind = getattr(internals, f"{answer}ResponseVerbose")
        language = request.language or "en"
        return kind(duration=duration_s, language=language, text="", segments=[])
    if answer == "Translation":
        return internals.TranslationResponse(text="")
    usage = {"type": "duration", "seconds": math.ceil(duration_s)}
    return internals.TranscriptionResponse(text="", usage=usage)


async def _no_events() -> AsyncIterator[str]:
    yield _DONE


async def _openai_events(events: AsyncIterator[str], duration_s: float) -> AsyncIterator[str]:
    """Yield vLLM's events with OpenAI's fields, and OpenAI's last event."""
    pieces: list[str] = []
    common: dict[str, Any] = {}
    failed = False
    async for event in events:
        if event == _DONE:
            break
        data = msgspec.json.decode(event.encode().removeprefix(_DATA))
        failed = failed or "error" in data
        if choices := data.get("choices"):
            common = {name: data[name] for name in ("id", "object", "created", "model")}
            piece = choices[0]["delta"].get("content") or ""
            piece = piece if pieces else piece.lstrip()
            if piece:
                pieces.append(piece)
            choices[0]["delta"]["content"] = piece
            data = {"type": "transcript.text.delta", "delta": piece, **data}
        yield _event(data)
    if not failed:
        usage = {"type": "duration", "seconds": math.ceil(duration_s)}
        text = "".join(pieces).strip()
        done = {"type": "transcript.text.done", "text": text, "usage": usage}
        yield _event({**done, **common, "choices": []})
    yield _DONE


def _event(data: Any) -> str:
    return f"data: {msgspec.json.encode(data).decode()}\n\n"


def _adapt(handler: Any) -> None:
    """Let a handler take ``_Recording`` in the place of a file, and read times leniently."""

    async def decoded(recording: _Recording) -> tuple[list[Any], float]:
        return recording.windows, recording.audio.duration_s

    handler._decode_and_chunk_speech_async = decoded
    if "Whisper" in handler.model_cls.__name__:
        handler._get_verbose_segments = _segment_reader(handler)
        # A cached property. Set before the first request.
        handler.model_cls = _whisper_prompts(handler)


def _segment_reader(handler: Any) -> Callable[..., list[Any]]:
    tokenizer = handler.tokenizer
    first_time = tokenizer.encode("<|0.00|>", add_special_tokens=False)[0]

    def read_segments(
        tokens: tuple[int, ...],
        log_probs: Any,
        request: Any,
        segment_class: Any,
        start_time: float = 0,
    ) -> list[Any]:
        if tokens and tokens[-1] == tokenizer.eos_token_id:
            tokens = tokens[:-1]
        values = [log_probs[index][token].logprob for index, token in enumerate(tokens)]
        window_s = _recording.get().window_s(start_time)
        segments: list[Any] = []
        for span in transcripts.split_segments(tokens, values, first_time, window_s):
            text = tokenizer.decode(span.tokens, skip_special_tokens=True)
            if not text.strip():
                continue
            segment = segment_class(
                id=len(segments),
                seek=int(start_time),
                start=start_time + span.start_s,
                end=start_time + span.end_s,
                temperature=request.temperature,
                text=text,
                compression_ratio=transcripts.compression_ratio(text),
                tokens=list(span.tokens),
                avg_logprob=span.avg_logprob,
            )
            segments.append(segment)
        return segments

    return read_segments


def _whisper_prompts(handler: Any) -> Any:
    model, tokenizer = handler.model_cls, handler.tokenizer
    knows_english_only = handler.model_config.get_vocab_size() < MULTILINGUAL_TOKENS

    class Prompts(model):  # type: ignore[misc,valid-type]
        @classmethod
        def validate_language(cls, language: str | None) -> str | None:
            if knows_english_only and (language or "en").lower() != "en":
                raise InvalidRequestError(
                    f"The model knows English only; `language` is `{language}`.", param="language"
                )
            if knows_english_only:
                return "en"
            try:
                return super().validate_language(language)  # type: ignore[no-any-return]
            except ValueError as error:
                raise InvalidRequestError(str(error), param="language") from None

        @classmethod
        def get_generation_prompt(cls, stt_params: Any) -> Any:
            prompt = super().get_generation_prompt(replace(stt_params, request_prompt=""))
            decoder = prompt["decoder_prompt"]
            tokens = decoder["prompt"]
            if knows_english_only:  # these were never trained with a language or task
                tokens = tokens.replace(f"<|en|><|{stt_params.task_type}|>", "")
            if stt_params.request_prompt:
                text = f" {stt_params.request_prompt.strip()}"
                ids = tokenizer.encode(text, add_special_tokens=False)[-MAX_PROMPT_TOKENS:]
                tokens = f"<|startofprev|>{tokenizer.decode(ids)}{tokens}"
            decoder["prompt"] = tokens
            return prompt

    return Prompts
