"""Set-up of Serve's HTTP proxies: at the start of a router, of new proxies, after failures."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.config import RouterConfig
from cluster.haproxy_internals import ProxySettings
from deployments import proxies, router
from deployments.proxies import ProxySetup
from tests.serve.deployment_kit import Background, make_config, replace_ray, running_router
from tests.serve.link_kit import until


class Proxy:
    """Actor of an HTTP proxy; ``applied`` are the settings that it got."""

    def __init__(self) -> None:
        self.applied: list[ProxySettings] = []
        self.__ray_call__ = SimpleNamespace(remote=self._call)

    async def _call(self, settings: ProxySettings) -> str:
        self.applied.append(settings)
        return ""


class Controller:
    """Serve's controller, which has a proxy on each node."""

    def __init__(self, *proxies: Proxy) -> None:
        self.proxies = dict(enumerate(proxies))
        self.is_up = True
        self.get_proxies = SimpleNamespace(remote=self._get_proxies)

    async def _get_proxies(self) -> dict[int, Proxy]:
        if not self.is_up:
            raise RuntimeError("the controller restarts")
        return dict(self.proxies)


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    controller = Controller(Proxy())
    monkeypatch.setattr(proxies.ray, "get_actor", lambda name, namespace: controller)
    monkeypatch.setattr(proxies, "proxy_setup", lambda settings: settings)
    monkeypatch.setattr(proxies, "PERIOD_S", 0.01)
    return controller


async def test_a_replaced_haproxy_outlives_the_longest_answer(controller: Controller) -> None:
    setup = ProxySetup(RouterConfig(max_answer_s=90))
    await setup.set_up_all()
    await setup.close()
    (settings,) = controller.proxies[0].applied
    assert 90 < settings.drain_s <= 90 + 60


async def test_each_proxy_is_set_up_once(
    controller: Controller,
) -> None:
    setup = ProxySetup(RouterConfig())
    await setup.set_up_all()
    assert len(controller.proxies[0].applied) == 1
    controller.proxies[1] = Proxy()
    await until(lambda: controller.proxies[1].applied)
    await setup.close()
    assert [len(proxy.applied) for proxy in controller.proxies.values()] == [1, 1]


async def test_a_failed_first_set_up_is_tried_again(
    controller: Controller, caplog: pytest.LogCaptureFixture
) -> None:
    controller.is_up = False
    setup = ProxySetup(RouterConfig())
    await setup.set_up_all()
    assert "HTTP proxies are not set up yet" in caplog.text
    controller.is_up = True
    async with asyncio.timeout(60):
        await until(lambda: controller.proxies[0].applied)
    await setup.close()


async def test_a_router_is_not_ready_before_the_proxies_are_set_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    events: list[str] = []

    class SlowSetup(Background):
        async def set_up_all(self) -> None:
            await asyncio.sleep(0.01)
            events.append("proxies")

    replace_ray(monkeypatch, tmp_path)
    monkeypatch.setattr(router, "ProxySetup", SlowSetup)
    async with running_router(make_config()):
        events.append("ready")
    assert events == ["proxies", "ready"]
