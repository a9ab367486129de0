"""The router deployment: the gateway, fed by Serve's view of the replicas."""

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from importlib.metadata import version

from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve.handle import DeploymentHandle

from cluster.config import TandemConfig
from cluster.gateway import Gateway, GatewayApp, Request, Response
from cluster.gateway.messages import Headers, header, request_id
from cluster.launch.loopback import confine_serve
from deployments.discovery import Discovery
from deployments.secret import link_secret

ResponseHead = tuple[int, Headers]


@serve.ingress()
class Router:
    """One replica of the router; HTTP comes through ``__serve_build_asgi_app__``."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: TandemConfig, pools: Mapping[str, DeploymentHandle]
    ) -> None:
        confine_serve()
        versions = {"tandem": version("tandem"), "ray": version("ray")}
        self._gateway = Gateway(config, link_secret(), versions)
        self._discovery = Discovery(
            {
                DeploymentID(handle.deployment_name, handle.app_name): self._gateway.pools[
                    name
                ].update
                for name, handle in pools.items()
            }
        )

    def __serve_build_asgi_app__(self) -> GatewayApp:
        """The ASGI application that Serve runs in this replica."""
        return GatewayApp(self._gateway, returns_request_id=False)

    async def call(
        self, method: str, path: str, body: bytes, headers: Headers | None = None
    ) -> AsyncIterator[ResponseHead | bytes]:
        """A request from another Ray job: first the response's head, then its chunks.

        The caller is inside the cluster, so no API key is asked for.
        """
        response = await self._respond(method, path, body, headers)
        async with aclosing(response.body) as chunks:
            yield response.status, response.headers
            async for chunk in chunks:
                yield chunk

    async def ask(
        self, method: str, path: str, body: bytes, headers: Headers | None = None
    ) -> tuple[int, Headers, bytes]:
        """``call`` with the whole body at once, for answers that are not streamed."""
        response = await self._respond(method, path, body, headers)
        async with aclosing(response.body) as chunks:
            whole = b"".join([chunk async for chunk in chunks])
        return response.status, response.headers, whole

    async def _respond(
        self, method: str, path: str, body: bytes, headers: Headers | None
    ) -> Response:
        headers = headers or [(b"content-type", b"application/json")]
        path, _, query = path.partition("?")
        identity = request_id(header(headers, b"x-request-id"))
        request = Request(identity, method, path, query.encode(), headers, body)
        return await self._gateway.respond(request)

    def check_health(self) -> None:
        """Raise when this router would not learn of replicas any more; Serve then replaces it."""
        self._discovery.check_health()

    async def __del__(self) -> None:
        """Close the links; Serve awaits this after the last request ended."""
        if hasattr(self, "_discovery"):
            await self._discovery.close()
            await self._gateway.close()
