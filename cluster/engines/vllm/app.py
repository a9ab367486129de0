"""vLLM's FastAPI application, reduced to the routes that clients may call."""

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

from cluster.engines.vllm import internals

PUBLIC_PATHS = (
    "/v1/",
    "/v2/",
    "/tokenize",
    "/detokenize",
    "/inference/v1/generate",
    "/generative_scoring",
    "/pooling",
    "/classify",
    "/score",
    "/rerank",
)
"""Prefixes of paths that clients may call.

vLLM's application also has paths that monitor it (/metrics, /load, /health, /ping, /version,
/kv_event_sources, /docs), dispatch to any other path (/invocations), abort requests of other
clients (/inference/v1/abort_requests) or change the engine (/scale_elastic_ep; in development mode
/sleep, /pause, /collective_rpc, ...).
"""
PRIVATE_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
OPENAPI_PATH = "/openapi.json"
"""Served for the router only, which merges the documents of all engines."""


async def build_app(llm: Any, args: Namespace) -> Any:
    """Return vLLM's application for the ``AsyncLLM``."""
    tasks = await llm.get_supported_tasks()
    app = internals.build_app(args, tasks, llm.model_config)
    # vLLM's handler of engine errors sets should_exit on its server. Without a server the handler
    # itself would fail and hide the engine's error.
    app.state.server = SimpleNamespace(should_exit=False)
    await internals.init_app_state(llm, app.state, args, tasks)
    app.router.routes[:] = [route for route in app.router.routes if _is_public(route)]
    return app


def public_routes(app: Any) -> tuple[str, ...]:
    """Return the path templates that clients may call."""
    paths = dict.fromkeys(route.path for route in app.router.routes)
    return tuple(path for path in paths if path != OPENAPI_PATH)


def _is_public(route: Any) -> bool:
    path = getattr(route, "path", "")
    if not getattr(route, "methods", None):  # websockets and mounts
        return False
    return path == OPENAPI_PATH or (path.startswith(PUBLIC_PATHS) and path not in PRIVATE_PATHS)
