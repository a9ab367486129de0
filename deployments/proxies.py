"""Serve's HTTP proxies: Tandem's limits, and a restart of HAProxy as soon as it dies.

Serve has no setting for either. Proxies are actors of Serve, which start before the application and
on every new node, so each router sets up the proxies that it has not seen yet.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import ray

from cluster.config import RouterConfig
from cluster.haproxy_internals import ProxySettings, proxy_setup
from cluster.periodic import Periodic
from cluster.serve_internals import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

logger = logging.getLogger("ray.serve.tandem")

PERIOD_S = 5.0
"""Seconds between searches for new proxies."""
TIMEOUT_S = 10.0
"""Maximum duration of a call to the controller or to a proxy, in seconds."""
RELOAD_S = 60
"""Time for which a replaced HAProxy process outlives the longest answer, in seconds."""


class ProxySetup:
    """Sets up every HTTP proxy of the cluster; call ``close`` at the end."""

    def __init__(self, config: RouterConfig) -> None:
        self._settings = _settings(config)
        self._setup = proxy_setup(self._settings)
        self._applied: dict[Any, Callable[[Any], str]] = {}  # by proxy
        self._task = Periodic("setup of the HTTP proxies", PERIOD_S, self._set_up_new)

    async def set_up_all(self) -> None:
        """Set up the present proxies; failures are logged, and the periodic task tries again.

        Await this before a new router is ready. HAProxy has no targets then, so the settings come
        with its first reload; later they cost another one, which closes idle connections.
        """
        try:
            await self._set_up_new()
        except Exception:
            logger.exception("HTTP proxies are not set up yet; trying again")

    async def reconfigure(self, config: RouterConfig) -> None:
        """Apply changed settings to all proxies, whose HAProxy is then reloaded."""
        if (settings := _settings(config)) != self._settings:
            self._settings, self._setup = settings, proxy_setup(settings)
            await self.set_up_all()

    async def close(self) -> None:
        await self._task.close()

    async def _set_up_new(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            proxies = set((await controller.get_proxies.remote()).values())
        self._applied = {proxy: done for proxy, done in self._applied.items() if proxy in proxies}
        for proxy in proxies:
            setup = self._setup
            if self._applied.get(proxy) is setup:
                continue
            async with asyncio.timeout(TIMEOUT_S):
                missing = await proxy.__ray_call__.remote(setup)
            self._applied[proxy] = setup
            if missing:
                logger.error(
                    "HAProxy has no limits and is not restarted quickly: this release of Ray Serve "
                    "differs in %s. Install the release named in cluster/ray_internals.py.",
                    missing,
                )


def _settings(config: RouterConfig) -> ProxySettings:
    return ProxySettings(
        header_timeout_s=config.header_timeout_s,
        client_timeout_s=config.client_timeout_s,
        max_connections_per_address=config.max_connections_per_address,
        drain_s=config.max_answer_s + RELOAD_S,
        certificate=config.tls.certificate if config.tls else None,
        key=config.tls.key if config.tls else None,
    )
