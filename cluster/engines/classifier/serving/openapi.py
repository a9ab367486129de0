"""The encoder's part of the OpenAPI document, made from the bodies that it reads and writes."""

from collections.abc import Mapping
from typing import Any

import msgspec

from cluster.engines.classifier.serving.tasks.base import Task

PATH = "/openapi.json"
_REFERENCE = "#/components/schemas/{name}"


def document(tasks: Mapping[str, Task[Any]]) -> dict[str, Any]:
    """The OpenAPI document of ``tasks``, by path."""
    bodies = [body for task in tasks.values() for body in (task.request, task.response)]
    schemas, components = msgspec.json.schema_components(bodies, ref_template=_REFERENCE)
    pairs = zip(schemas[::2], schemas[1::2], strict=True)
    paths = {
        path: {"post": _operation(task.summary, body, reply)}
        for (path, task), (body, reply) in zip(tasks.items(), pairs, strict=True)
    }
    return {"openapi": "3.1.0", "paths": paths, "components": {"schemas": components}}


def _operation(summary: str, body: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {"200": {"description": "OK", "content": _json(reply)}},
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
