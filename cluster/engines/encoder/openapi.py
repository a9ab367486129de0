"""The encoder's part of the OpenAPI document, made from the bodies that it really parses."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from cluster.engines.encoder.schema import ClassifyRequest, EmbeddingsRequest

PATH = "/openapi.json"
_REFERENCE = "#/components/schemas/{name}"
_ENDPOINTS: Mapping[str, tuple[str, type]] = {
    "/classify": ("The labels of a text, or of each of a list.", ClassifyRequest),
    "/v1/embeddings": ("A text, or each of a list, as a unit vector.", EmbeddingsRequest),
}


def document(routes: Iterable[str]) -> dict[str, Any]:
    """The OpenAPI document of those of the encoder's paths that are served."""
    served = {path: _ENDPOINTS[path] for path in routes}
    schemas, components = msgspec.json.schema_components(
        [body for _, body in served.values()], ref_template=_REFERENCE
    )
    paths = {
        path: {"post": _operation(summary, schema)}
        for (path, (summary, _)), schema in zip(served.items(), schemas, strict=True)
    }
    return {"openapi": "3.1.0", "paths": paths, "components": {"schemas": components}}


def _operation(summary: str, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": {"description": "OK", "content": {"application/json": {}}}},
    }
