"""Operations of the knowledge bases: paths, bodies, results, and their OpenAPI descriptions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter

from cluster.applications.http import event_schema
from cluster.config.applications import KNOWLEDGE_PATH
from cluster.tasks.knowledge import (
    MAX_ID_CHARS,
    AddResult,
    BaseName,
    CreateKnowledgeRequest,
    Deleted,
    DocumentList,
    Knowledge,
    KnowledgeAnswer,
    KnowledgeAnswerRequest,
    KnowledgeList,
    MediaType,
    SearchRequest,
    SearchResult,
)

MAX_LISTED = 1000
"""Documents in one answer."""
_BASE = KNOWLEDGE_PATH + "/{name}"
_DOCUMENTS = _BASE + "/documents"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path."""

    name: str
    method: str
    path: str
    summary: str
    result: type[BaseModel]
    request: type[BaseModel] | None = None
    """JSON body."""


OPERATIONS = (
    Operation("list", "GET", KNOWLEDGE_PATH, "List the knowledge bases.", KnowledgeList),
    Operation(
        *("create", "POST", KNOWLEDGE_PATH, "Create a knowledge base.", Knowledge),
        request=CreateKnowledgeRequest,
    ),
    Operation("get", "GET", _BASE, "Describe a knowledge base.", Knowledge),
    Operation("delete", "DELETE", _BASE, "Delete a knowledge base.", Deleted),
    Operation("documents", "GET", _DOCUMENTS, "List the documents.", DocumentList),
    Operation("add", "POST", _DOCUMENTS, "Add a document, or replace it.", AddResult),
    Operation("remove", "DELETE", _DOCUMENTS + "/{document}", "Delete a document.", Deleted),
    Operation(
        *("search", "POST", _BASE + "/search", "Find passages.", SearchResult),
        request=SearchRequest,
    ),
    Operation(
        *("answer", "POST", _BASE + "/answer", "Answer a question.", KnowledgeAnswer),
        request=KnowledgeAnswerRequest,
    ),
)

_FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "id": {
            "type": "string",
            "description": "Id of the document. Default: the name of the file.",
        },
        "type": {
            "type": "string",
            "enum": list(get_args(MediaType)),
            "description": "Format of the file. Default: by its name.",
        },
    },
}
_PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "name": TypeAdapter(BaseName).json_schema(),
    "document": {"type": "string", "minLength": 1, "maxLength": MAX_ID_CHARS},
}
_LIST_PARAMETERS = [
    {
        "name": "limit",
        "in": "query",
        "description": "Maximum number of documents.",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_LISTED},
    },
    {
        "name": "after",
        "in": "query",
        "description": "Id of the last document of the answer before.",
        "schema": {"type": "string"},
    },
]


def openapi_paths(schemas: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    """Return the OpenAPI items of all paths; ``schemas`` are those of the models by direction."""
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        item = paths.setdefault(operation.path, {})
        item[operation.method.lower()] = _describe(operation, schemas)
    return paths


def _describe(operation: Operation, schemas: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    result = schemas[operation.result, "serialization"]
    content = {"application/json": {"schema": result}}
    if operation.name == "answer":
        content["text/event-stream"] = {"schema": event_schema(result)}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "tags": ["Knowledge"],
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": schema}
            for name, schema in _PARAMETERS.items()
            if f"{{{name}}}" in operation.path
        ],
        "responses": {"200": {"description": "OK", "content": content}},
    }
    if operation.name == "documents":
        described["parameters"] += _LIST_PARAMETERS
    if operation.name == "add":
        form = {"multipart/form-data": {"schema": _FORM}}
        described["requestBody"] = {"required": True, "content": form}
    if operation.request is not None:
        body = {"application/json": {"schema": schemas[operation.request, "validation"]}}
        described["requestBody"] = {"required": True, "content": body}
    return described
