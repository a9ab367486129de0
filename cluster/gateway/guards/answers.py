"""Answers of the APIs, streamed or not, with their texts checked."""

import json
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from cluster.errors import LinkError, ReplicaLostError, RequestError, UnavailableError
from cluster.gateway.error_formats import error_events
from cluster.gateway.guards.formats import (
    FORMATS,
    Event,
    Key,
    ResponsesFormat,
    answer_roots,
    block_document,
    encode_event,
)
from cluster.gateway.guards.window import AnswerBlockedError, AnswerGuards, AnswerText
from cluster.gateway.messages import Body, GuardNotes, Response, bytes_response
from cluster.guards import find_texts

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
        document = json.loads(content)
        for root, name in answer_roots(path, document):
            try:
                for slot in list(find_texts(root, name)):
                    text = AnswerText(guards, is_json=slot.is_json)
                    slot.text = await text.push(slot.text, is_final=True)
            except AnswerBlockedError:
                block_document(path, document, root)
            if guards.hides_tokens:
                FORMATS[path]().hide_tokens(document)
    except BaseException:
        await guards.abandon()
        raise
    await guards.finish()
    body = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    headers = [pair for pair in response.headers if pair[0] not in (b"content-length", _TYPE[0])]
    return bytes_response(response.status, _TYPE[1], body.encode(errors="replace"), headers)


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
        self._texts: dict[Key, AnswerText] = {}
        self._ended: dict[str, str] = {}  # complete texts of the engine, and those of the client
        self._parts: dict[Key, tuple[list[str], list[str]]] = {}
        self._rest = b""
        self._ready: deque[bytes] = deque()
        self._is_named = False
        self._number = 0
        self._first = self._last = b""
        self._is_done = False

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
            self._is_done = True
            if self._rest:
                self._ready.append(self._rest)
            await self._guards.finish()
            return
        except BaseException:
            self._is_done = True
            await self._guards.abandon()
            raise
        *events, self._rest = (self._rest + chunk).split(b"\n\n")
        try:
            for event in events:
                await self._pass_on(event)
        except AnswerBlockedError:
            await self._end(200, b"".join(map(self._encode, self._format.blocked())))
        except RequestError as error:
            last = b"".join(self._ready) or self._last
            await self._end(error.status, error_events(self._path, error, self._first, last) or b"")
        except BaseException:
            await self.aclose()
            raise

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
        except ValueError:  # `[DONE]`, or a comment
            event = None
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
                text = self._texts[delta.key] = AnswerText(self._guards, is_json=delta.is_json)
            passed = delta.container[delta.field] = await text.push(part, is_final=is_final)
            self._keep(delta.key, part, passed)
        for key in [key for key in self._texts if self._format.ends(event, key)]:
            await self._finish_text(event, key)
        if isinstance(self._format, ResponsesFormat):
            await self._replace_full_texts(self._format, event)
        if self._guards.hides_tokens:
            self._format.hide_tokens(event)
        self._ready.append(self._encode(event))

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
        for root, name in roots:
            for slot in list(find_texts(root, name)):
                known = self._ended.get(slot.text)
                if known is None:  # it was not streamed
                    text = AnswerText(self._guards, is_json=slot.is_json)
                    known = await text.push(slot.text, is_final=True)
                slot.text = known

    def _encode(self, event: Event) -> bytes:
        if "sequence_number" in event:
            event["sequence_number"] = self._number  # there may be more events than the engine's
            self._number += 1
        return encode_event(event, is_named=self._is_named)
