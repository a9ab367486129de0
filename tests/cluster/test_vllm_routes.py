"""The routes of vLLM's real application: each is known, and clients reach only the listed ones."""

import json
import re
from typing import Any
from unittest.mock import MagicMock

import pytest

from cluster.engines.vllm import internals
from cluster.engines.vllm.openapi import describe
from cluster.engines.vllm.routes import (
    PUBLIC_ROUTES,
    public_routes,
    remove_private_routes,
    remove_unsupported_routes,
)

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

PRIVATE_ROUTES = {
    *(("GET", path) for path in ("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")),
    *(("HEAD", path) for path in ("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")),
    *(("GET", path) for path in ("/health", "/load", "/metrics", "/ping", "/version")),
    ("GET", "/kv_event_sources"),
    ("MOUNT", "/metrics"),
    ("POST", "/inference/v1/abort_requests"),
    ("POST", "/invocations"),
    ("POST", "/is_scaling_elastic_ep"),
    ("POST", "/ping"),
    ("POST", "/scale_elastic_ep"),
    ("WEBSOCKET", "/v1/realtime"),
}
"""Routes of vLLM 0.32 that clients must not reach, in its default mode."""
TASKS = ("generate", "transcription", "realtime", "embed", "classify", "token_embed", "render")


@pytest.fixture
def vllm_app() -> Any:
    """Return vLLM's application with the routes of all tasks."""
    args = internals.make_arg_parser(internals.FlexibleArgumentParser()).parse_args([])
    model = MagicMock(**{"get_pooling_task.return_value": "embed"})
    return internals.build_app(args, TASKS, model)


def routes_of(app: Any) -> set[tuple[str, str]]:
    """Return method and path of each route."""
    found = set()
    for route in app.router.routes:
        kind = "WEBSOCKET" if "WebSocket" in type(route).__name__ else "MOUNT"
        found |= {(method, route.path) for method in getattr(route, "methods", None) or (kind,)}
    return found


def test_every_route_of_vllm_is_known_and_clients_reach_the_public_ones_only(vllm_app: Any) -> None:
    found, known = routes_of(vllm_app), PUBLIC_ROUTES.keys() | PRIVATE_ROUTES
    assert found - known == set(), "new in this release: list each as public or as private"
    assert known - found == set(), "no longer in this release"
    remove_private_routes(vllm_app)
    assert routes_of(vllm_app) == PUBLIC_ROUTES.keys()
    assert set(public_routes(vllm_app)) == {path for _, path in PUBLIC_ROUTES}


def test_the_document_has_a_schema_for_each_body_and_each_answer(vllm_app: Any) -> None:
    remove_private_routes(vllm_app)
    document = describe(vllm_app)
    found = {
        (method.upper(), path): operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }
    assert found.keys() == PUBLIC_ROUTES.keys()
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references <= document["components"]["schemas"].keys()
    for (method, path), operation in found.items():
        content = operation["responses"]["200"]["content"]
        assert content["application/json"]["schema"], path
        streams = PUBLIC_ROUTES[method, path].event is not None
        assert ("text/event-stream" in content) == streams
        if method == "POST" and not path.endswith("/cancel"):
            assert all(body["schema"] for body in operation["requestBody"]["content"].values())


def test_routes_that_the_model_does_not_support_are_removed(vllm_app: Any) -> None:
    remove_private_routes(vllm_app)
    handlers = {route.handler for route in PUBLIC_ROUTES.values()}
    for handler in handlers - {"serving_structured_decisions"}:
        setattr(vllm_app.state, handler, object())
    vllm_app.state.serving_structured_decisions = None
    remove_unsupported_routes(vllm_app)
    assert routes_of(vllm_app) == PUBLIC_ROUTES.keys() - {("POST", "/v1/systemone")}
