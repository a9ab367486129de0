"""OpenAPI document of the router's paths and its engines' paths."""

from collections.abc import Iterable, Mapping
from typing import Any

_BUILTIN_PATHS: Mapping[str, str] = {
    "/health": "Liveness of the router.",
    "/ready": "State of every pool; 503 if a pool has no ready replica.",
    "/version": "Versions of Tandem and its components.",
    "/v1/models": "Models that can be named in `model`.",
    "/openapi.json": "This document.",
    "/dashboard/data": "The last minutes of all routers, second by second.",
    "/metrics": "Metrics of this router in Prometheus' text format.",
}


def merge_documents(version: str, documents: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one document with the router's paths and those of ``documents``.

    The first definition of a path or schema wins.
    """
    paths: dict[str, Any] = {path: _get(summary) for path, summary in _BUILTIN_PATHS.items()}
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
