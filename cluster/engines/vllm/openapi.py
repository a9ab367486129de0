"""OpenAPI document of vLLM's application.

vLLM declares the bodies of requests, but not of its answers. Both are described by the types that
vLLM itself uses.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Union

import msgspec
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from cluster.engines.vllm import internals
from cluster.engines.vllm.routes import OPENAPI_PATH, ROUTES
from cluster.engines.vllm.speech import PATHS as SPEECH_PATHS

_REFERENCE = "#/components/schemas/{model}"
_OPENAI_PATHS = tuple(
    f"/v1/{name}" for name in ("audio", "chat", "completions", "embeddings", "models", "responses")
)
_END_OF_STREAM = {"const": "[DONE]"}

Schemas = Mapping[Any, dict[str, Any]]
"""Schema by (method, path, part of the operation) and pydantic's mode."""


def serve_document(app: Any) -> None:
    """Add the route of the document; ``describe`` runs on its first request."""

    @cache
    def encoded() -> bytes:
        return msgspec.json.encode(describe(app))

    def respond(_request: Request) -> Response:  # not async, so Starlette calls it in a thread
        return Response(encoded(), media_type="application/json")

    app.add_route(OPENAPI_PATH, respond)


def describe(app: Any) -> dict[str, Any]:
    """Return the document of the public routes in vLLM's application.

    Takes about a second of CPU time.
    """
    routes = [
        (method, route)
        for route in app.router.routes
        if route.path != OPENAPI_PATH
        for method in sorted(route.methods)
    ]
    parts = [part for method, route in routes for part in _parts(method, route)]
    schemas, definitions = TypeAdapter.json_schemas(parts, ref_template=_REFERENCE)
    paths: dict[str, Any] = {}
    for method, route in routes:
        operation = _operation(method, route, schemas)
        paths.setdefault(route.path, {})[method.lower()] = operation
    components = {"schemas": definitions.get("$defs", {})}
    return {"openapi": "3.1.0", "paths": paths, "components": components}


def _parts(method: str, route: Any) -> Iterator[tuple[tuple[str, str, str], Any, TypeAdapter[Any]]]:
    public = ROUTES[method, route.path]
    if route.body_field is not None:
        body = TypeAdapter(route.body_field.field_info.annotation)
        yield (method, route.path, "request"), "validation", body
    reply = route.response_model if public.reply is None else _type_named(public.reply)
    yield (method, route.path, "reply"), "serialization", TypeAdapter(reply)
    if public.event is not None:
        event = TypeAdapter(_type_named(public.event))
        yield (method, route.path, "event"), "serialization", event


def _type_named(names: str) -> Any:
    return Union[tuple(getattr(internals, name) for name in names.split("|"))]  # noqa: UP007


def _operation(method: str, route: Any, schemas: Schemas) -> dict[str, Any]:
    public = ROUTES[method, route.path]
    reply = schemas[(method, route.path, "reply"), "serialization"]
    content = {"application/json": {"schema": reply}}
    if public.event is not None:
        event = schemas[(method, route.path, "event"), "serialization"]
        content["text/event-stream"] = {"schema": _event(event)}
    if route.path in SPEECH_PATHS:
        content["text/plain"] = content["text/vtt"] = {"schema": {"type": "string"}}
    operation: dict[str, Any] = {
        "summary": public.summary,
        "tags": [_tag(route.path)],
        "responses": {"200": {"description": "OK", "content": content}},
    }
    if parameters := list(_parameters(route.dependant)):
        operation["parameters"] = parameters
    if route.body_field is not None:
        body = {"schema": schemas[(method, route.path, "request"), "validation"]}
        media_type = route.body_field.field_info.media_type
        operation["requestBody"] = {"required": True, "content": {media_type: body}}
    return operation


def _event(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of one server-sent event whose data is JSON."""
    data = {"contentMediaType": "application/json", "contentSchema": schema}
    return {
        "type": "object",
        "required": ["data"],
        "properties": {
            "event": {"type": "string"},
            "data": {"type": "string", "anyOf": [_END_OF_STREAM, data]},
        },
    }


def _parameters(dependant: Any) -> Iterator[dict[str, Any]]:
    for place in ("path", "query"):
        for field in getattr(dependant, f"{place}_params"):
            yield {
                "name": field.alias,
                "in": place,
                "required": place == "path",
                "schema": TypeAdapter(field.field_info.annotation).json_schema(),
            }


def _tag(path: str) -> str:
    if path.startswith("/v1/messages"):
        return "Anthropic"
    return "OpenAI" if path.startswith(_OPENAI_PATHS) else "vLLM"
