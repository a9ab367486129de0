"""Generator whose answers a test chooses, in the formats of all four APIs, as vLLM writes them."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

from cluster.asgi import Message, Receive, Scope, Send, usage_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
APIS = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)
ROUTES = (*APIS, "/inference/v1/generate", "/v1/responses/{response_id}", "/tokenize")
DONE = b"data: [DONE]\n\n"

Reply = Callable[[dict[str, Any]], list[str]]


def request_for(path: str, text: str, **fields: Any) -> dict[str, Any]:
    """Return a request of an API with a prompt."""
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
    if path == COMPLETIONS:
        prompt = {"prompt": text}
    if path == RESPONSES:
        prompt = {"input": text}
    return {"model": "gen", "max_tokens": 100, **prompt, **fields}


def prompt_of(body: dict[str, Any]) -> str:
    """Return the text of a request that ``request_for`` made."""
    found = body.get("prompt", body.get("input"))
    return str(body["messages"][-1]["content"] if found is None else found)


def text_of(path: str, document: dict[str, Any]) -> str:
    """Return the text of a complete answer."""
    if path == RESPONSES:
        return "".join(part["text"] for item in document["output"] for part in item["content"])
    if path == MESSAGES:
        return "".join(part["text"] for part in document["content"])
    (choice,) = document["choices"]
    return str(choice["message"]["content"] or "" if path == CHAT else choice["text"])


def streamed_text(path: str, events: list[dict[str, Any]]) -> str:
    """Return the text of a stream."""
    return "".join(_parts(path, events))


def _parts(path: str, events: list[dict[str, Any]]) -> Iterator[str]:
    for event in events:
        for choice in event.get("choices", ()):
            yield choice["delta"].get("content") or "" if path == CHAT else choice["text"]
        if event.get("type") == "content_block_delta":
            yield event["delta"]["text"]
        if event.get("type") == "response.output_text.delta":
            yield event["delta"]


class ScriptedGenerator:
    """Application that answers with the parts of text that ``reply`` returns for a request."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.bodies: list[dict[str, Any]] = []
        self.cancelled = 0
        self.begins = asyncio.Event()
        """Set when an answer may begin; at once unless a test clears it."""
        self.begins.set()
        self.goes_on = asyncio.Event()
        """Set when a stream may go on behind its first part."""
        self.goes_on.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        content = b""
        while True:
            message: Message = await receive()
            content += message.get("body", b"")
            if not message.get("more_body"):
                break
        body = json.loads(content)
        self.bodies.append(body)
        usage_of(scope).prompt_tokens = 3
        try:
            await self.begins.wait()
            await self._answer(scope["path"], body, self.reply(body), send)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _answer(self, path: str, body: dict[str, Any], parts: list[str], send: Send) -> None:
        is_stream = bool(body.get("stream"))
        kind = b"text/event-stream" if is_stream else b"application/json"
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if not is_stream:
            document = json.dumps(_document(path, "".join(parts)), ensure_ascii=False).encode()
            await send({"type": "http.response.body", "body": document})
            return
        for number, event in enumerate(_events(path, parts)):
            await send({"type": "http.response.body", "body": event, "more_body": True})
            if number == 2:
                await self.goes_on.wait()
        await send({"type": "http.response.body", "body": b""})


def _document(path: str, text: str) -> dict[str, Any]:
    if path == RESPONSES:
        return _response(text, "completed")
    if path == MESSAGES:
        content = [{"type": "text", "text": text}]
        return {"type": "message", "content": content, "stop_reason": "end_turn"}
    message = {"role": "assistant", "content": text}
    choice: dict[str, Any] = {"message": message} if path == CHAT else {"text": text}
    tokens = {"logprobs": {"content": [{"token": text}]}}
    choice |= {"index": 0, "finish_reason": "stop", **tokens}
    return {"object": "chat.completion", "choices": [choice]}


def _response(text: str | None, status: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "logprobs": [{"token": text}]}
    item = {"type": "message", "id": "msg_1", "role": "assistant", "content": [part]}
    output = [] if text is None else [item]
    # With `enable_response_messages`.
    messages = [{"message": text, "tokens": [1]}]
    return {
        **{"id": "resp_1", "object": "response", "status": status, "output": output},
        "output_messages": messages if output else None,
    }


def _events(path: str, parts: list[str]) -> Iterator[bytes]:
    if path in (CHAT, COMPLETIONS):
        yield from _chunks(path == CHAT, parts)
    else:
        named = _response_events(parts) if path == RESPONSES else _message_events(parts)
        for event in named:
            yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


def _chunks(is_chat: bool, parts: list[str]) -> Iterator[bytes]:
    base = {"id": "c-1", "object": "chat.completion.chunk" if is_chat else "text_completion"}
    contents: list[tuple[dict[str, Any], str | None]]
    if is_chat:
        contents = [({"delta": {"role": "assistant", "content": ""}}, None)]
        contents += [({"delta": {"content": part}}, None) for part in parts]
        contents.append(({"delta": {}}, "stop"))
    else:
        contents = [({"text": part}, None) for part in parts]
        contents.append(({"text": ""}, "stop"))
    for content, reason in contents:
        choice = {"index": 0, **content, "finish_reason": reason, "logprobs": {"x": 1}}
        yield f"data: {json.dumps({**base, 'choices': [choice]})}\n\n".encode()
    yield DONE


def _message_events(parts: list[str]) -> Iterator[dict[str, Any]]:
    yield {"type": "message_start", "message": {"type": "message", "content": []}}
    yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    for part in parts:
        delta = {"type": "text_delta", "text": part}
        yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    yield {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {}}
    yield {"type": "message_stop"}


def _response_events(parts: list[str]) -> Iterator[dict[str, Any]]:
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    text = "".join(parts)
    item = _response(text, "completed")["output"][0]
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": _response(None, "in_progress")},
        {"type": "response.output_item.added", "item": {**item, "content": []}},
        *({"type": "response.output_text.delta", "delta": part, **place} for part in parts),
        {"type": "response.output_text.done", "text": text, **place},
        {"type": "response.content_part.done", "part": item["content"][0], **place},
        {"type": "response.output_item.done", "item": item, "output_index": 0},
        {"type": "response.completed", "response": _response(text, "completed")},
    ]
    for number, event in enumerate(events):
        yield {**event, "sequence_number": number}
