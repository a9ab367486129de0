"""The routes of vLLM's real application: each is known, and clients reach only the listed ones."""

from typing import Any
from unittest.mock import MagicMock

import pytest

from cluster.engines.vllm import internals
from cluster.engines.vllm.app import PUBLIC_ROUTES, public_routes, remove_private_routes

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


@pytest.fixture(scope="module")
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
    found, known = routes_of(vllm_app), PUBLIC_ROUTES | PRIVATE_ROUTES
    assert found - known == set(), "new in this release: list each as public or as private"
    assert known - found == set(), "no longer in this release"
    remove_private_routes(vllm_app)
    internal = {("GET", "/openapi.json"), ("HEAD", "/openapi.json")}
    assert routes_of(vllm_app) == PUBLIC_ROUTES | internal
    assert set(public_routes(vllm_app)) == {path for _, path in PUBLIC_ROUTES}
