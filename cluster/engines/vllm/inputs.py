"""Requests and answers that vLLM's application handles differently from the vendors' servers.

Some malformed requests would get a 5xx or another request's answer; some fields and paths of the
vendors' APIs are missing.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import wraps
from traceback import walk_tb
from typing import Any, Literal

import msgspec
from pydantic import BaseModel

from cluster.asgi import ASGIApp, Message, Receive, Scope, Send, read_body
from cluster.engines.json_body import decode_json
from cluster.engines.vllm import internals
from cluster.engines.vllm.pattern_limits import check_patterns
from cluster.engines.vllm.requests import Generate
from cluster.engines.vllm.routes import INPUT_TOKENS_PATH
from cluster.errors import request_error_for

_VALIDATION = "request_body_to_args"
"""FastAPI's function that validates a request's body."""
_RENDERERS = "vllm.renderers."
"""vLLM's modules that build a prompt from a request."""
_NULLABLE = ("stop_reason", "stop_sequence")
"""Fields that Anthropic's messages always have."""
_DEFECTS = (AttributeError, LookupError, AssertionError, RecursionError)


class ReadJson:
    """Middleware that rejects what is not JSON, and reads schemas in the format of TGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            InvalidRequestError: The body is not JSON, although its type says so.
        """
        content_type = dict(scope["headers"]).get(b"content-type", b"").lower()
        if scope["method"] != "POST" or b"json" not in content_type:
            await self._app(scope, receive, send)
            return
        body = await read_body(receive)
        if body is None:
            return
        if body:
            body = _read_schema(decode_json(body)) or body
        first: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def receive_body() -> Message:
            nonlocal first
            message, first = first, None
            return message or await receive()

        await self._app(scope, receive_body, send)


def _read_schema(request: Any) -> bytes | None:
    """Return a body with OpenAI's form of a JSON schema if the request has that of TGI.

    ``huggingface_hub`` turns OpenAI's form into ``{"type": "json_object", "value": SCHEMA}``, whose
    value vLLM would ignore.
    """
    wanted = request.get("response_format") if isinstance(request, dict) else None
    if not isinstance(wanted, dict) or wanted.get("type") not in ("json", "json_object"):
        return None
    if not isinstance(schema := wanted.get("value"), dict):
        return None
    schema = {"name": "answer", "schema": schema}
    request["response_format"] = {"type": "json_schema", "json_schema": schema}
    return msgspec.json.encode(request)


def reject_uncompiled(generate: Generate) -> Generate:
    """Wrap ``generate`` to raise vLLM's 400 if the engine cannot follow a structured output.

    vLLM checks a request with several backends, and compiles all with the one that the first
    request needed. If that fails, or if the grammar matches no text (``root ::= root "a"``), the
    request ends with an error in its first output. See ``check_patterns``, too.
    """

    @wraps(generate)
    def wrapper(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = generate(prompt, sampling_params, *args, **kwargs)
        structured = getattr(sampling_params, "structured_outputs", None)
        # Most requests are not structured; their tokens must not pass another generator.
        return outputs if structured is None else _raise_if_uncompiled(outputs, structured)

    return wrapper


async def _raise_if_uncompiled(
    outputs: AsyncGenerator[Any, None], structured: Any
) -> AsyncGenerator[Any, None]:
    is_first = True
    async with aclosing(outputs):
        check_patterns(structured)
        async for output in outputs:
            if is_first:
                if any(choice.finish_reason == "error" for choice in output.outputs):
                    raise internals.VLLMValidationError(
                        "The engine cannot compile this structured output, or no text matches it. "
                        "Simplify it.",
                        parameter="structured_outputs",
                    )
                is_first = not any(choice.token_ids for choice in output.outputs)
            yield output


def report_validation_defects(app: Any) -> None:
    """Let errors where vLLM reads requests, and assumes types, be 400 instead of 500."""
    from starlette.responses import JSONResponse

    async def handle(_request: Any, error: Exception) -> Any:
        if not _is_from_reading(error):
            raise error
        known = request_error_for(400, f"A field of the request has a wrong type: {error}")
        return JSONResponse(known.body(), known.status)

    for kind in _DEFECTS:
        app.add_exception_handler(kind, handle)
    app.middleware_stack = app.build_middleware_stack()  # vLLM has built it with the old handlers


def _is_from_reading(error: BaseException) -> bool:
    return any(
        frame.f_code.co_name == _VALIDATION
        or str(frame.f_globals.get("__name__")).startswith(_RENDERERS)
        for frame, _ in walk_tb(error.__traceback__)
    )


def complete_messages(handler: Any) -> None:
    """Let vLLM's handler of ``/v1/messages`` return fields that are null, which it leaves out."""

    class Answer(internals.AnthropicMessagesResponse):  # type: ignore[misc]
        def model_dump(self, **options: Any) -> dict[str, Any]:
            dump = super().model_dump(**options)
            names = [n for n in type(self).model_fields if n in dump or n in _NULLABLE]
            return {name: dump.get(name) for name in names}

    create = handler.create_messages

    @wraps(create)
    async def create_messages(*args: Any, **kwargs: Any) -> Any:
        answer = await create(*args, **kwargs)
        if isinstance(answer, internals.AnthropicMessagesResponse):
            return Answer.model_construct(**dict(answer))
        return answer

    handler.create_messages = create_messages


class InputTokens(BaseModel):
    """Answer of ``INPUT_TOKENS_PATH``."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


def add_input_tokens(app: Any) -> None:
    """Add ``INPUT_TOKENS_PATH`` to the application of a model that has ``/v1/responses``."""
    from starlette.responses import JSONResponse

    state = app.state
    if getattr(state, "openai_serving_responses", None) is None:
        return
    render = internals.ServingRender(
        state.openai_serving_models,
        state.online_renderer,
        request_logger=None,
        tool_server=state.tool_server,
    )

    async def count_input_tokens(request: Any) -> Any:
        rendered = await render.render_responses_request(request)
        if (error := getattr(rendered, "error", None)) is not None:
            return JSONResponse(rendered.model_dump(), error.code)
        return InputTokens(input_tokens=len(rendered.token_ids))

    count_input_tokens.__annotations__["request"] = internals.ResponsesRequest
    app.add_api_route(
        INPUT_TOKENS_PATH, count_input_tokens, methods=["POST"], response_model=InputTokens
    )
