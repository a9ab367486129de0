"""vLLM's FastAPI application, reduced to the routes that clients may call."""

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

from cluster.engines.vllm import internals

PUBLIC_ROUTES = frozenset(
    {
        ("GET", "/v1/models"),
        ("GET", "/v1/responses/{response_id}"),
        ("POST", "/classify"),
        ("POST", "/detokenize"),
        ("POST", "/generative_scoring"),
        ("POST", "/inference/v1/generate"),
        ("POST", "/pooling"),
        ("POST", "/rerank"),
        ("POST", "/score"),
        ("POST", "/tokenize"),
        ("POST", "/v1/audio/transcriptions"),
        ("POST", "/v1/audio/translations"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/chat/completions/batch"),
        ("POST", "/v1/chat/completions/derender"),
        ("POST", "/v1/chat/completions/render"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/completions/derender"),
        ("POST", "/v1/completions/render"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/messages"),
        ("POST", "/v1/messages/count_tokens"),
        ("POST", "/v1/messages/render"),
        ("POST", "/v1/rerank"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/responses/render"),
        ("POST", "/v1/responses/{response_id}/cancel"),
        ("POST", "/v1/score"),
        ("POST", "/v1/systemone"),
        ("POST", "/v2/embed"),
        ("POST", "/v2/rerank"),
    }
)
"""Methods and path templates of vLLM 0.32 that clients may call.

``tests/cluster/test_vllm_routes.py`` lists the others, and names those of a new release. They
monitor vLLM, dispatch to any other path, abort requests of other clients, or change the engine.
"""
OPENAPI_PATH = "/openapi.json"
"""Served for the router only, which merges the documents of all engines."""


async def build_app(llm: Any, args: Namespace) -> Any:
    tasks = await llm.get_supported_tasks()
    app = internals.build_app(args, tasks, llm.model_config)
    # vLLM's handler of engine errors sets should_exit on its server. Without a server the handler
    # itself would fail and hide the engine's error.
    app.state.server = SimpleNamespace(should_exit=False)
    await internals.init_app_state(llm, app.state, args, tasks)
    remove_private_routes(app)
    return app


def remove_private_routes(app: Any) -> None:
    """Leave ``PUBLIC_ROUTES`` and the OpenAPI document in vLLM's application."""
    app.router.routes[:] = [route for route in app.router.routes if _is_public(route)]


def public_routes(app: Any) -> tuple[str, ...]:
    paths = dict.fromkeys(route.path for route in app.router.routes)
    return tuple(path for path in paths if path != OPENAPI_PATH)


def _is_public(route: Any) -> bool:
    path = getattr(route, "path", "")
    methods = getattr(route, "methods", None)
    if not methods:  # websockets and mounts
        return False
    return path == OPENAPI_PATH or all((method, path) in PUBLIC_ROUTES for method in methods)
