"""The OpenAPI document of the whole: the router's own paths and those of its engines."""

from collections.abc import Iterable, Mapping
from typing import Any

_OWN_PATHS: Mapping[str, str] = {
    "/health": "The router works.",
    "/ready": "Every pool has a replica that can answer; 503 where one has not.",
    "/version": "Versions of Tandem and of what it runs on.",
    "/v1/models": "Every model that can be named in `model`.",
    "/openapi.json": "This document.",
    "/dashboard/data": "The last minutes of all routers, second by second.",
    "/metrics": "What this router counts, in Prometheus' text format.",
}


def merge(version: str, documents: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One document out of the router's own paths and those of ``documents``.

    Where two define the same path or schema, the first one stands.
    """
    paths: dict[str, Any] = {path: _get(summary) for path, summary in _OWN_PATHS.items()}
    components: dict[str, dict[str, Any]] = {}
    for document in documents:
        for path, item in document.get("paths", {}).items():
            paths.setdefault(path, item)
        for section, entries in document.get("components", {}).items():
            components.setdefault(section, {})
            for name, entry in entries.items():
                components[section].setdefault(name, entry)
    components.setdefault("securitySchemes", {})["apiKey"] = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tandem", "version": version},
        "paths": dict(sorted(paths.items())),
        "components": components,
        "security": [{"apiKey": []}, {}],
    }


def _get(summary: str) -> dict[str, Any]:
    answer = {"200": {"description": "OK", "content": {"application/json": {"schema": {}}}}}
    return {"get": {"summary": summary, "responses": answer}}
