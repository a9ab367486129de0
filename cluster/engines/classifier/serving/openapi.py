"""OpenAPI document of a classifier's paths, made from the types of their bodies."""

from collections.abc import Mapping
from typing import Any

import msgspec

from cluster.engines.classifier.serving.endpoints import PathEndpoints

TIMING_HEADERS = ("x-tandem-tokenize-ms", "x-tandem-queue-ms", "x-tandem-compute-ms")
"""Headers with the durations of a request's phases in milliseconds."""
WARNING_HEADER = "x-tandem-warning"
"""Header that names the request's fields that were ignored."""


def openapi_document(paths: Mapping[str, PathEndpoints]) -> dict[str, Any]:
    endpoints = [endpoint for path in paths.values() for endpoint in path.endpoints]
    bodies = [body for endpoint in endpoints for body in (endpoint.request, endpoint.response)]
    # The prefix keeps the names apart from vLLM's in the router's document.
    reference = "#/components/schemas/Classifier.{name}"
    schemas, components = msgspec.json.schema_components(bodies, ref_template=reference)
    rest = iter(schemas)
    described = {}
    for name, path in paths.items():
        pairs = [(next(rest), next(rest)) for _ in path.endpoints]
        requests, replies = ([pair[i] for pair in pairs] for i in (0, 1))
        described[name] = {path.method.lower(): _operation(path, requests, replies)}
    named = {f"Classifier.{name}": schema for name, schema in components.items()}
    return {"openapi": "3.1.0", "paths": described, "components": {"schemas": named}}


def _operation(path: PathEndpoints, requests: list[Any], replies: list[Any]) -> dict[str, Any]:
    headers = {name: {"schema": {"type": "number"}} for name in TIMING_HEADERS}
    headers[WARNING_HEADER] = {"schema": {"type": "string"}}
    content = _json_content(replies)
    if path.returns_bytes:
        content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    reply = {"description": "OK", "headers": headers, "content": content}
    operation: dict[str, Any] = {
        "summary": path.endpoints[0].summary,
        "tags": ["Classifiers"],
        "responses": {"200": reply},
    }
    if path.method == "POST":
        operation["requestBody"] = {"required": True, "content": _json_content(requests)}
    return operation


def _json_content(schemas: list[Any]) -> dict[str, Any]:
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"application/json": {"schema": schema}}
