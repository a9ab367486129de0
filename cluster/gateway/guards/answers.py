"""Answers of the APIs, streamed or not, with their texts checked."""

import json
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from cluster.errors import LinkError, ReplicaLostError, RequestError, UnavailableError
from cluster.gateway.error_formats import error_events
from cluster.gateway.guards.answer_guards import AnswerBlockedError, AnswerGuards, check_slots
from cluster.gateway.guards.checks import run_sized
from cluster.gateway.guards.formats import (
    FORMATS,
    TOKEN_FIELDS,
    Event,
    Key,
    ResponsesFormat,
    answer_roots,
    block_document,
    encode_event,
)
from cluster.gateway.guards.window import AnswerText, JsonAnswerText
from cluster.gateway.messages import Body, GuardNotes, Response, bytes_response
from cluster.guards import DocumentTexts, find_texts, remove_fields

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Size of the largest answer that is held until it is checked; longer ones must be streamed."""


async def guard_document(response: Response, path: str, guards: AnswerGuards) -> Response:
    """Return a complete JSON answer with its texts checked.

    Raises:
        UnavailableError: A check failed and the guard is closed, the replica was lost, or the
            answer is too large.
    """
    try:
        content = await _read_all(response.body)
        document = await run_sized(len(content), partial(_decode, content))
        await _check_document(document, path, guards)
        encode = partial(_encode_document, document)
        body = await run_sized(len(content), encode)
    except BaseException:
        await guards.abandon()
        raise
    await guards.finish()
    headers = [pair for pair in response.headers if pair[0] not in (b"content-length", _TYPE[0])]
    return bytes_response(response.status, _TYPE[1], body, headers)


async def _check_document(document: Event, path: str, guards: AnswerGuards) -> None:
    """Check all texts at once, so that a classifier gets few requests."""
    parts: list[tuple[Event, DocumentTexts]] = []
    for root, name in answer_roots(path, document):
        try:
            parts.append((root, find_texts(root, name)))
        except ValueError as error:
            raise UnavailableError(f"Guards cannot check the answer: {error}.") from None
    checked = iter(await guards.check([slot.text for _, texts in parts for slot in texts.slots]))
    for root, texts in parts:
        found = [next(checked) for _ in texts.slots]
        if None in found:
            block_document(path, document, root)
            continue
        for slot, text in zip(texts.slots, found, strict=True):
            slot.text = str(text)
        texts.write()
    if guards.change_text:
        remove_fields(document, TOKEN_FIELDS)


def _decode(content: bytes) -> Event:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UnavailableError(f"Guards cannot read the answer: {error}") from None
    if not isinstance(document, dict):
        raise UnavailableError("Guards cannot read the answer, which is not a JSON object.")
    return document


def _encode_document(document: Event) -> bytes:
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="replace")


_FAILURES = ("error", "response.failed")
_TYPE = (b"content-type", b"application/json")


async def _read_all(body: Body) -> bytes:
    content = bytearray()
    try:
        async for chunk in body:
            content += chunk
            if len(content) > MAX_ANSWER_BYTES:
                raise UnavailableError(
                    f"The answer exceeds the {MAX_ANSWER_BYTES} bytes that guards can check at "
                    "once. Set `stream`."
                )
    except LinkError as error:
        raise ReplicaLostError(f"The replica was lost: {error}", retry_after_s=1) from error
    finally:
        await body.aclose()
    return bytes(content)


class GuardedStream:
    """A stream of events with its texts checked."""

    def __init__(self, body: Body, path: str, guards: AnswerGuards, notes: GuardNotes) -> None:
        self._body = body
        self._path = path
        self._guards = guards
        self._notes = notes
        self._format = FORMATS[path]()
        self._texts: dict[Key, AnswerText | JsonAnswerText] = {}
        self._ended: dict[str, str] = {}  # complete texts of the engine, and those of the client
        self._parts: dict[Key, tuple[list[str], list[str]]] = {}
        self._rest = b""
        self._ready: deque[bytes] = deque()
        self._is_named = False
        self._number = 0
        self._first = self._last = b""
        self._is_done = False
        self._is_cut_off = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._ready:
            if self._is_done:
                raise StopAsyncIteration
            await self._read()
        chunk = b"".join(self._ready)
        self._ready.clear()
        self._first = self._first or chunk
        self._last = chunk
        return chunk

    async def aclose(self) -> None:
        """Cancel the rest of the answer."""
        self._is_done = True
        await self._body.aclose()
        await self._guards.abandon()

    async def _read(self) -> None:
        try:
            chunk = await anext(aiter(self._body))
        except StopAsyncIteration:
            await self._finish()
            return
        except BaseException:
            self._is_done = True
            await self._guards.abandon()
            raise
        *events, self._rest = (self._rest + chunk).split(b"\n\n")
        await self._pass_all(events)

    async def _finish(self) -> None:
        """Pass on what is held when the engine has ended the stream."""
        self._is_done = True
        rest, self._rest = self._rest, b""
        if not await self._pass_all([rest] if rest else [], is_final=True):
            return
        await (self._guards.abandon() if self._is_cut_off else self._guards.finish())

    async def _pass_all(self, events: Sequence[bytes], *, is_final: bool = False) -> bool:
        """Pass on events; return False if a guard ends the stream."""
        try:
            for event in events:
                await self._pass_on(event)
            if is_final and not self._is_cut_off:  # no event ended the texts
                for key in list(self._texts):
                    await self._finish_text({}, key)
        except AnswerBlockedError:
            last = self._format.blocked()
            for each in last:
                remove_fields(each, TOKEN_FIELDS)
            await self._end(200, b"".join(map(self._encode, last)))
        except RequestError as error:
            before = b"".join(self._ready) or self._last
            await self._end(
                error.status, error_events(self._path, error, self._first, before) or b""
            )
        except BaseException:
            await self.aclose()
            raise
        else:
            return True
        return False

    async def _end(self, status: int, events: bytes) -> None:
        """End the answer with these events; the engine stops."""
        self._notes.status = status
        if not self._is_named and status == 200:
            events += b"data: [DONE]\n\n"
        self._ready.append(events)
        await self.aclose()

    async def _pass_on(self, raw: bytes) -> None:
        data = b"".join(line[5:] for line in raw.split(b"\n") if line.startswith(b"data:"))
        try:
            event: Any = json.loads(data)
        except ValueError:  # `[DONE]`, a comment, or a part of an event at the end
            event = None
            if self._guards.change_text and data.strip() not in (b"", b"[DONE]"):
                return
        if isinstance(event, dict) and (event.get("error") or event.get("type") in _FAILURES):
            self._is_cut_off = True
        # Events without texts, such as those with the usage, pass as they are.
        if not isinstance(event, dict) or not (event.get("choices") or "type" in event):
            self._ready.append(raw + b"\n\n")
            return
        self._is_named = self._is_named or raw.startswith(b"event:")
        deltas = list(self._format.deltas(event))
        for delta in deltas:
            for key in list(self._texts):
                if delta.container[delta.field] and self._format.is_followed(key, delta.key):
                    await self._finish_text(event, key)
        for delta in deltas:
            part = delta.container[delta.field]
            is_final = self._format.ends(event, delta.key)
            text = self._texts.get(delta.key)
            if text is None:
                kind = JsonAnswerText if delta.is_json else AnswerText
                text = self._texts[delta.key] = kind(self._guards)
            passed = delta.container[delta.field] = await text.push(part, is_final=is_final)
            self._keep(delta.key, part, passed)
        for key in [key for key in self._texts if self._format.ends(event, key)]:
            await self._finish_text(event, key)
        if isinstance(self._format, ResponsesFormat):
            try:
                await self._replace_full_texts(self._format, event)
            except ValueError as error:
                raise UnavailableError(f"Guards cannot check the answer: {error}.") from None
        if self._guards.change_text:
            remove_fields(event, TOKEN_FIELDS)
        self._ready.append(self._encode(event))
        self._format.passed(event)

    async def _finish_text(self, event: Event, key: Key) -> None:
        tail = await self._texts.pop(key).push("", is_final=True)
        if tail:
            self._ready.append(self._encode(self._format.tail(event, key, tail)))
        self._keep(key, "", tail)
        if (parts := self._parts.pop(key, None)) is not None:
            self._ended["".join(parts[0])] = "".join(parts[1])

    def _keep(self, key: Key, part: str, passed: str) -> None:
        """Keep what the Responses API repeats at the end of each text."""
        if isinstance(self._format, ResponsesFormat):
            parts = self._parts.setdefault(key, ([], []))
            parts[0].append(part)
            parts[1].append(passed)

    async def _replace_full_texts(self, format_: ResponsesFormat, event: Event) -> None:
        names = ["part", "item"]
        if (field := format_.full_field(event)) is not None:
            names.append(field)
        roots = [(event, name) for name in names if name in event]
        if isinstance(event.get("response"), dict) and "output" in event["response"]:
            roots.append((event["response"], "output"))
        texts = DocumentTexts(known=self._ended)
        for root, name in roots:
            texts.add(root, name)
        await check_slots(self._guards, texts)  # those that were not streamed

    def _encode(self, event: Event) -> bytes:
        if "sequence_number" in event:
            event["sequence_number"] = self._number  # there may be more events than the engine's
            self._number += 1
        return encode_event(event, is_named=self._is_named)
