"""OpenAPI document of the router's paths and its engines' paths.

Engines describe the bodies of their requests and answers. The router adds what it does itself:
headers, errors, API keys and its own paths (``own_paths``).
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import msgspec

from cluster.errors import RequestError
from cluster.gateway.admission.admission import PRIORITY_HEADER, SESSION_HEADER, TIMEOUT_HEADER
from cluster.gateway.admission.answer_keys import KEY_HEADER, MAX_KEY_CHARS
from cluster.gateway.builtin.own_answers import AnthropicErrorBody, ErrorBody
from cluster.gateway.builtin.own_paths import OWN_PATHS, OwnPath
from cluster.gateway.choice import CHOICE_HEADER, FALLBACK_HEADER
from cluster.gateway.error_formats import is_anthropic
from cluster.gateway.guards import GUARD_HEADER, REQUESTED_HEADER
from cluster.gateway.pools.response_usage import USAGE_EVENT, USAGE_HEADER
from cluster.link import REPLAYED

_SCHEMAS = "#/components/schemas/"
_STREAM = "text/event-stream"
_COMMON_STATUSES = (400, 405, 431, 500)
"""Errors of all paths: an invalid request id, a wrong method, long headers, a bug."""

_ENGINE_HEADERS: Mapping[bytes, tuple[str, dict[str, Any]]] = {
    TIMEOUT_HEADER: (
        "Deadline of the whole answer in seconds.",
        {"type": "number", "exclusiveMinimum": 0},
    ),
    PRIORITY_HEADER: ("-8 to 8; limited to the priority of the key.", {"type": "integer"}),
    SESSION_HEADER: ("Session for the routing policy `session`.", {"type": "string"}),
    USAGE_HEADER: (
        "1 adds energy and cost to the answer, 0 declines.",
        {"type": "string", "enum": ["0", "1"]},
    ),
    REQUESTED_HEADER: (
        "Guards that check the request in addition to those of the API key, with commas between.",
        {"type": "string"},
    ),
    b"traceparent": ("W3C trace context.", {"type": "string"}),
}
_KEY_NAME, _REPLAYED_NAME = KEY_HEADER.decode(), REPLAYED[0].decode()
_GUARD_NAME = GUARD_HEADER.decode()
_CHOICE_NAMES = CHOICE_HEADER.decode(), FALLBACK_HEADER.decode()
_KEY_PARAMETER = {
    "description": "The same key again, within a minute, gets the same answer.",
    "schema": {
        "type": "string",
        "minLength": 1,
        "maxLength": MAX_KEY_CHARS,
        "pattern": "^[!-~]([ -~]*[!-~])?$",
    },
}
_REPLAYED = {
    "description": "`true` if an earlier request with this `Idempotency-Key` began the answer.",
    "schema": {"type": "string", "enum": ["true"]},
}
_CHOICE = {
    "description": "Model that `model: auto` means, the rule and its conditions.",
    "schema": {"type": "string"},
}
_FALLBACK = {
    "description": "Models that could not answer, with their status, such as `large=429`.",
    "schema": {"type": "string"},
}
_GUARDS = {
    "description": "Guards that found something or failed, such as `personal-data=redacted`.",
    "schema": {"type": "string"},
}
_REQUEST_ID = {
    "description": "Id of the request: the client's or a new one.",
    "schema": {"type": "string"},
}
_RETRY_AFTER = {
    "description": "Seconds after which a retry may succeed.",
    "schema": {"type": "integer", "minimum": 1},
}
_USAGE_EVENT = {
    "description": f"Last event of a stream, after `[DONE]`, with `{USAGE_HEADER.decode()}: 1`.",
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"const": USAGE_EVENT},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {
                "type": "object",
                "required": ["joules"],
                "properties": {
                    "joules": {"type": ["number", "null"]},
                    "joules_missing": {"type": "string"},
                    "source": {"type": "string"},
                    "cost": {"type": ["number", "null"]},
                    "currency": {"type": "string"},
                },
            },
        },
    },
}
_TAGS = {
    "OpenAI": "OpenAI's API, answered by generators and classifiers.",
    "Anthropic": "Anthropic's API, answered by generators.",
    "vLLM": "Other paths of vLLM.",
    "Classifiers": "Labels, entities, scores, rankings, masks.",
    "Tasks": "Typed tasks, answered by the applications.",
    "Knowledge": "Knowledge bases: documents to search and to answer from.",
    "Router": "Models, state, usage and pages of the router.",
}


def make_document(
    version: str, own: Iterable[str], documents: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the document of the router's ``own`` paths and of its engines' documents.

    If several engines describe an operation, it accepts and answers what any of them does. The
    first definition of a schema wins.
    """
    paths: dict[str, dict[str, Any]] = {path: _own_item(path, OWN_PATHS[path]) for path in own}
    schemas = dict(_own_schemas()[1])
    for document in documents:
        for path, item in document.get("paths", {}).items():
            if path not in OWN_PATHS:
                _add_item(paths.setdefault(path, {}), path, item)
        for name, schema in document.get("components", {}).get("schemas", {}).items():
            schemas.setdefault(name, schema)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tandem",
            "version": version,
            "description": "Language models and classifiers behind one router.",
        },
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": schemas, **_components()},
        "security": [{"bearer": []}, {"apiKey": []}, {}],
    }


def _add_item(merged: dict[str, Any], path: str, item: Mapping[str, Any]) -> None:
    for method, operation in item.items():
        added = _engine_operation(method, path, operation)
        known = merged.setdefault(method, added)
        if known is added:
            continue
        if "requestBody" in known and "requestBody" in added:
            known["requestBody"] = _either(known["requestBody"], added["requestBody"])
        ok, also = known["responses"]["200"], added["responses"]["200"]
        known["responses"]["200"] = _either(ok, also)


def _either(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return a body or an answer that has the schema of ``first`` or of ``second``."""
    contents = dict(first.get("content", {}))
    for media_type, content in second.get("content", {}).items():
        if media_type not in contents:
            contents[media_type] = content
            continue
        known, schema = contents[media_type]["schema"], content["schema"]
        options = _options(known)
        if added := [one for one in _options(schema) if one not in options]:
            contents[media_type] = {"schema": {"anyOf": [*options, *added]}}
    return {**first, "content": contents}


def _options(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return list(schema["anyOf"]) if schema.keys() - {"title"} == {"anyOf"} else [schema]


def _engine_operation(method: str, path: str, operation: Mapping[str, Any]) -> dict[str, Any]:
    names = ["x-request-id", *(name.decode() for name in _ENGINE_HEADERS)]
    headers = _headers()
    if method == "post":
        names.append(_KEY_NAME)
        for name in (_REPLAYED_NAME, _GUARD_NAME, *_CHOICE_NAMES):
            headers[name] = {"$ref": f"#/components/headers/{name}"}
    parameters = [{"$ref": f"#/components/parameters/{name}"} for name in names]
    answers = {
        status: {**answer, "headers": {**answer.get("headers", {}), **headers}}
        for status, answer in operation.get("responses", {}).items()
    }
    answers.setdefault("200", {"description": "OK", "headers": headers})
    answers["200"] = _with_usage_event(answers["200"])
    return {
        "operationId": _operation_id(method, path),
        **operation,
        "parameters": [*operation.get("parameters", ()), *parameters],
        "responses": {**answers, **_errors(path, _statuses())},
    }


def _with_usage_event(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of an engine as the router sends it: streams may have one more event."""
    if _STREAM not in answer.get("content", {}):
        return answer
    return _either(answer, {"content": {_STREAM: {"schema": _USAGE_EVENT}}})


def _own_item(path: str, own: OwnPath) -> dict[str, Any]:
    return {each.method: _own_operation(path, each) for each in (own, *own.others)}


def _own_operation(path: str, own: OwnPath) -> dict[str, Any]:
    answers = {"200": {"description": "OK", "headers": _headers(), "content": _content(own)}}
    if own.has_503:
        answers["503"] = {**answers["200"], "description": "Not ready"}
    statuses = {*_COMMON_STATUSES, *own.statuses, *(() if own.is_public else (401,))}
    request_id = {"$ref": "#/components/parameters/x-request-id"}
    operation: dict[str, Any] = {
        "operationId": _operation_id(own.method, path),
        "summary": own.summary,
        "tags": [own.tag],
        "parameters": [*own.parameters, request_id],
        "responses": {**answers, **_errors(path, statuses)},
    }
    if own.body is not None:
        content = {"application/json": {"schema": _own_schemas()[0][own.body]}}
        operation["requestBody"] = {"required": True, "content": content}
    if own.form is not None:
        content = {"multipart/form-data": {"schema": dict(own.form)}}
        operation["requestBody"] = {"required": True, "content": content}
    if own.is_public:
        operation["security"] = []
    return operation


def _content(own: OwnPath) -> dict[str, Any]:
    schema = _own_schemas()[0][own.reply]
    content = {own.media_type: {"schema": schema}}
    if own.text_media_type is not None:
        content[own.text_media_type] = {"schema": {"type": "string"}}
    return content


def _operation_id(method: str, path: str) -> str:
    return "_".join([method, *re.findall(r"\w+", path)])


def _headers() -> dict[str, Any]:
    return {"x-request-id": {"$ref": "#/components/headers/x-request-id"}}


def _statuses() -> list[int]:
    return sorted({error.status for error in RequestError.__subclasses__()})


def _errors(path: str, statuses: Iterable[int]) -> dict[str, Any]:
    vendor = "Anthropic" if is_anthropic(path) else ""
    return {
        str(status): {"$ref": f"#/components/responses/{vendor}{status}"}
        for status in sorted(statuses)
    }


@cache
def _own_schemas() -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    """Return the schema of each type of the router's answers, and those that they refer to."""
    all_own = [each for own in OWN_PATHS.values() for each in (own, *own.others)]
    types = {own.reply for own in all_own} | {ErrorBody, AnthropicErrorBody}
    types |= {own.body for own in all_own if own.body is not None}
    found, components = msgspec.json.schema_components(types, ref_template=_SCHEMAS + "{name}")
    return dict(zip(types, found, strict=True)), components


@cache
def _components() -> dict[str, Any]:
    parameters = {"x-request-id": {**_REQUEST_ID, "schema": {"type": "string", "maxLength": 128}}}
    parameters[_KEY_NAME] = _KEY_PARAMETER
    for name, (description, schema) in _ENGINE_HEADERS.items():
        parameters[name.decode()] = {"description": description, "schema": schema}
    return {
        "parameters": {
            name: {"name": name, "in": "header", **parameter}
            for name, parameter in parameters.items()
        },
        "headers": {
            "x-request-id": _REQUEST_ID,
            "retry-after": _RETRY_AFTER,
            _REPLAYED_NAME: _REPLAYED,
            _GUARD_NAME: _GUARDS,
            **dict(zip(_CHOICE_NAMES, (_CHOICE, _FALLBACK), strict=True)),
        },
        "responses": {
            f"{vendor}{error.status}": _error_response(error, body)
            for error in RequestError.__subclasses__()
            for vendor, body in (("", ErrorBody), ("Anthropic", AnthropicErrorBody))
        },
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        },
    }


def _error_response(error: type[RequestError], body: type) -> dict[str, Any]:
    headers = _headers()
    if error.status in (429, 503):
        headers["retry-after"] = {"$ref": "#/components/headers/retry-after"}
    return {
        "description": (error.__doc__ or error.type).splitlines()[0],
        "headers": headers,
        "content": {"application/json": {"schema": _own_schemas()[0][body]}},
    }
