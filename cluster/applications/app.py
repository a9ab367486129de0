"""ASGI application of the tasks and of the knowledge bases."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from functools import cache, partial
from typing import Any

from pydantic.json_schema import models_json_schema

from cluster.applications.calls import Calls
from cluster.applications.http import Reply, event_schema, parse_body, respond
from cluster.applications.knowledge.app import Call, KnowledgeApp, find_target
from cluster.applications.knowledge.operations import OPERATIONS, Operation, openapi_paths
from cluster.applications.tasks import Run, Task
from cluster.applications.tasks.table import TASKS_BY_PATH
from cluster.asgi import Receive, Scope, Send, read_body
from cluster.config.applications import is_knowledge_path
from cluster.errors import MethodNotAllowedError, NotFoundError

DOCUMENT_PATH = "/openapi.json"
_SCHEMAS = "#/components/schemas/{model}"

MakeRun = Callable[[Scope], Run]
OnEnd = Callable[[str, Calls, bool], None]
"""Called at the end of a request with the name of its task, its calls, and True if it succeeded."""


class ApplicationsApp:
    """ASGI application of all tasks and of the knowledge bases.

    Args:
        make_run: Returns the context of a request.
        on_end: See ``OnEnd``.
        knowledge: Answers requests to knowledge bases.
    """

    def __init__(self, make_run: MakeRun, on_end: OnEnd, knowledge: KnowledgeApp) -> None:
        self._make_run = make_run
        self._on_end = on_end
        self._knowledge = knowledge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await respond(scope["path"], send, partial(self._answer, scope, receive))

    async def _answer(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        method, path = scope["method"], scope["path"]
        if path == DOCUMENT_PATH and method == "GET":
            await reply.send_json(200, openapi())
        elif is_knowledge_path(path):
            target = find_target(method, path)
            call = Call(scope, receive, reply, self._make_run(scope), target)
            with self._counted(f"knowledge-{target.operation}", call.run.calls):
                await self._knowledge.answer(call)
        elif (task := TASKS_BY_PATH.get(path)) is None:
            raise NotFoundError(f"No such path: {path}. Tasks: {', '.join(TASKS_BY_PATH)}")
        elif method != "POST":
            raise MethodNotAllowedError.for_path(path, method, ["POST"])
        elif (body := await read_body(receive)) is not None:
            await self._run_task(task, body, self._make_run(scope), reply)

    async def _run_task(self, task: Task, body: bytes, run: Run, reply: Reply) -> None:
        request = parse_body(task.request, body, run.config.max_chars)
        with self._counted(task.name, run.calls):
            async with aclosing(task.run(request, run)) as items:
                if getattr(request, "stream", False):
                    await reply.stream(items)
                else:
                    await reply.send_result(items)

    @contextmanager
    def _counted(self, task: str, calls: Calls) -> Iterator[None]:
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            self._on_end(task, calls, succeeded)


@cache
def openapi() -> dict[str, Any]:
    """Return the OpenAPI document of all paths."""
    described: list[Task | Operation] = [*TASKS_BY_PATH.values(), *OPERATIONS]
    models = [(each.request, "validation") for each in described if each.request is not None]
    results = [(each.result, "serialization") for each in described]
    keys, definitions = models_json_schema([*models, *results], ref_template=_SCHEMAS)  # type: ignore[list-item]
    paths = {path: {"post": _operation(task, keys)} for path, task in TASKS_BY_PATH.items()}
    paths.update(openapi_paths(keys))
    return {
        "openapi": "3.1.0",
        "info": {"title": "Applications", "version": "1"},
        "paths": paths,
        "components": {"schemas": definitions["$defs"]},
    }


def _operation(task: Task, keys: Mapping[Any, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": keys[task.result, "serialization"]}}
    if task.streams:
        content["text/event-stream"] = {"schema": event_schema(keys[task.result, "serialization"])}
    body = {"application/json": {"schema": keys[task.request, "validation"]}}
    return {
        "summary": (task.request.__doc__ or task.name).splitlines()[0],
        "tags": ["Tasks"],
        "requestBody": {"required": True, "content": body},
        "responses": {"200": {"description": "OK", "content": content}},
    }
