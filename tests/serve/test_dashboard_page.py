"""Dashboard page in a real browser, with two routers and simulated engines under load."""

import asyncio
import hashlib
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from selenium.webdriver.common.keys import Keys

from benchmarks.ports import free_ports
from cluster.autoscaling import TargetChange
from cluster.config import parse
from cluster.engines.sim import SimEngine
from cluster.gateway import Gateway, GatewayApp, ReplicaInfo, RouterLinks, Wiring
from cluster.link import LinkServer
from cluster.rollout import RolloutState
from tests import asgi
from tests.serve.browser import Page, listening, start
from tests.serve.test_budgets import DIGEST, gateway_of_acme

SECRET = b"s" * 32
KEY = "open sesame"
SIM = {
    "prefill_s_per_token": 0.0005,
    "decode_s_per_token": 0.004,
    "num_kv_blocks": 60,
    "block_size_tokens": 16,
    "fail_rate": 0.03,
}
CHAT = "/v1/chat/completions"


class Routers:
    """Two routers of the same two generators, each with a simulated engine."""

    def __init__(self, routers):
        self.apps = [GatewayApp(router, authenticates=False) for router in routers]
        self.public_app = GatewayApp(routers[0])
        self._stopping = asyncio.Event()
        self._tasks = []

    def start_load(self, clients):
        self._tasks = [
            asyncio.create_task(self._send_requests(number)) for number in range(clients)
        ]

    async def stop_load(self):
        self._stopping.set()
        await asyncio.gather(*self._tasks)

    async def _send_requests(self, number):
        app = self.apps[number % len(self.apps)]
        model = "chat" if number % 3 else "draft"
        turn = 0
        while not self._stopping.is_set():
            turn += 1
            words = " ".join(f"word{number}" for _ in range(10 + (turn * 7) % 40))
            body = {
                "model": model if turn % 25 else "no-such-model",
                "messages": [{"role": "user", "content": words}],
                "max_tokens": 12 + (turn * 5) % 30,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            await asgi.post(app, CHAT, body, timeout_s=600)


@asynccontextmanager
async def running_routers(**router):
    config = parse(
        {
            "generators": [
                {"name": name, "model": "m", "engine": "sim", "sim": SIM, "max_in_flight": 6}
                for name in ("chat", "draft")
            ],
            "router": router,
        }
    )
    wirings = {generator.name: Wiring(SECRET) for generator in config.generators}
    async with AsyncExitStack() as stack:
        links = [RouterLinks(f"router-{number}", SECRET) for number in "ab"]
        gateways = [
            Gateway(
                *(config, wirings),
                routers=link,
                read_decisions=read_decisions,
                rollout_control=Rollouts(),
            )
            for link in links
        ]
        infos = []
        for gateway, link in zip(gateways, links, strict=True):
            server = LinkServer(GatewayApp(gateway, authenticates=False), SECRET)
            infos.append(ReplicaInfo(link.own_id, *await server.start()))
            for closing in (server.stop, link.close, gateway.close):
                stack.push_async_callback(closing)
        for link in links:
            link.update(infos)
        for generator in config.generators:
            engine = SimEngine(generator)
            await engine.start()
            stack.push_async_callback(engine.stop)
            server = LinkServer(engine.app, SECRET, load=engine.load)
            host, port = await server.start()
            stack.push_async_callback(server.stop)
            info = ReplicaInfo(f"{generator.name}-1", host, port, engine.routes())
            for gateway in gateways:
                gateway.pools[generator.name].update([info])
        running = Routers(gateways)
        stack.push_async_callback(running.stop_load)
        yield running


DECISIONS = [
    TargetChange(1_700_000_000 + n, pool, 1, 2, "ongoing", f"{n} requests of 4 each <b>")
    for n, pool in enumerate(["chat", "router"] * 15)
]


async def read_decisions():
    return DECISIONS


class Rollouts:
    async def states(self):
        state = RolloutState(version="2", model="m", replicas=1, room=1, since=0.0)
        return {"chat": state.note(1.0, "started", "room for 1 <b>")}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    driver = start(tmp_path_factory.mktemp("chromium"))
    yield DashboardPage(driver)
    driver.quit()


class DashboardPage(Page):
    """Tiles and lists of the page."""

    def tile(self, column):
        return self.script(f"document.querySelector('[data-column={column}] b').textContent")

    def number(self, column):
        shown = self.tile(column)
        return 0.0 if shown == "–" else float(shown.split()[0].replace(",", ""))

    def state(self):
        return self.by("state").text

    def rows(self, name):
        return [
            [cell.text for cell in row.find_elements("tag name", "td")]
            for row in self.all(f"#{name} tbody tr")
        ]


def check_log_command(page):
    page.all("#failures button")[0].click()  # the list does not change under the mouse
    page.until(lambda: page.by("copied").text)
    failure = page.rows("failures")[0]
    assert page.by("copied").text == f"Copied: tandem logs --request {failure[5]}"


def check_meanings(page, width):
    """Every tile and chart says what it shows, also without a mouse, within the page."""
    buttons = page.all(".tile .about button, #charts .about button")
    assert len(buttons) == len(page.all(".tile, #charts .card")) == 16
    for button in buttons:
        tip = page.by(button.get_attribute("aria-describedby"))
        page.driver.execute_script("arguments[0].focus()", button)
        assert tip.is_displayed()
        assert len(tip.text) > 40
        assert 0 <= tip.rect["x"] <= width - tip.rect["width"]
        assert page.script("innerWidth") == width  # a phone zooms out of what is too wide
        button.send_keys(Keys.ESCAPE)
        assert not tip.is_displayed()


async def test_page_shows_live_load(page):
    async with running_routers() as running, listening(running.public_app) as url:
        running.start_load(12)

        def check():
            page.open(f"{url}/dashboard", width=1100)
            page.until(lambda: page.state() == "live")
            for column in ("requests", "completion_tokens"):
                page.until(lambda column=column: page.number(column) > 1)
            for column in ("in_flight", "kv_cache"):
                page.until(lambda column=column: page.number(column) > 0)
            page.until(lambda: page.tile("ttft_p90").endswith("s"))
            page.until(lambda: page.rows("failures"))
            groups = [heading.text for heading in page.all("#replicas tbody th")]
            assert [group.partition(",")[0] for group in groups] == [
                "chat: generator",
                "draft: generator",
            ]
            assert all("1 replica, " in group for group in groups)
            replicas = [row[:2] for row in page.rows("replicas") if row]
            assert replicas == [["chat-1", "linked"], ["draft-1", "linked"]]
            check_log_command(page)
            check_meanings(page, 1100)
            statuses = {row[1] for row in page.rows("failures")}
            assert statuses <= {"404", "500"}
            assert "word" not in page.by("failures").text
            assert {row[1] for row in page.rows("changes")} == {"chat", "draft"}
            assert page.rows("rollouts")[0][1:] == ["chat", "2", "started", "room for 1 <b>"]
            decisions = page.rows("decisions")
            assert len(decisions) == 20
            assert decisions[0][1:] == ["router", "1", "2", "ongoing: 29 requests of 4 each <b>"]
            assert "Sum of 2 routers" in page.by("note").text
            nodes = page.script("window.kept = [...document.querySelectorAll('td, canvas')]")
            page.until(lambda: page.script("last > 0 && kept.times.length > 8"))
            assert page.script("window.kept.every((node) => node.isConnected)"), len(nodes)
            assert page.loads_only_from(url)
            assert page.driver.get_log("browser") == []

        await asyncio.to_thread(check)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1100), ("dark", 1100), ("dark", 360)])
async def test_page_has_light_and_dark_schemes_and_fits_a_phone(page, scheme, width):
    async with running_routers() as running, listening(running.public_app) as url:
        running.start_load(12)

        def check():
            page.open(f"{url}/dashboard", scheme, width, height=1500 if width > 500 else 2600)
            page.until(lambda: page.number("requests") > 1)
            assert page.script("document.documentElement.scrollWidth") <= width
            for plot in page.all(".plot"):
                assert plot.size["width"] <= width
            ground, ink = page.colors()
            assert (ground > 200 > 60 > ink) if scheme == "light" else (ground < 60 < 200 < ink)
            for table in page.all("table.list"):
                beyond = table.size["width"] - table.find_element("xpath", "..").size["width"]
                assert beyond <= 0 or width < 500, "only narrow screens may have to scroll a table"
            assert page.rows("decisions")[0][-1] in page.by("decisions").text
            check_meanings(page, width)

        await asyncio.to_thread(check)


@pytest.mark.parametrize(
    ("decisions", "text"),
    [([], "No changes of replica targets."), (None, "Autoscaling decisions are not available.")],
)
async def test_no_decisions_and_unknown_decisions_differ(page, monkeypatch, decisions, text):
    async def read():
        return decisions

    monkeypatch.setattr("tests.serve.test_dashboard_page.read_decisions", read)
    async with running_routers() as running, listening(running.public_app) as url:

        def check():
            page.open(f"{url}/dashboard")
            page.until(lambda: page.state() == "live")
            page.until(lambda: page.by("decisions").text == text)

        await asyncio.to_thread(check)


async def test_page_shows_lost_and_restored_connection(page):
    async with running_routers() as running:
        (port,) = free_ports(1)
        async with listening(running.public_app, port) as url:

            def connect():
                page.open(f"{url}/dashboard")
                page.until(lambda: page.state() == "live")

            await asyncio.to_thread(connect)
        state = await asyncio.to_thread(
            page.until, lambda: "not reachable" in page.state() and page.state()
        )
        assert "last update" in state
        assert "stale" in page.script("document.body.className")
        async with listening(running.public_app, port):
            await asyncio.to_thread(page.until, lambda: page.state() == "live")


@pytest.mark.parametrize("kind", ["operator_keys_sha256", "api_keys_sha256"])
async def test_page_asks_for_a_key_and_keeps_it(page, kind):
    keys = {kind: [hashlib.sha256(KEY.encode()).hexdigest()]}
    async with (
        running_routers(**keys) as running,
        listening(running.public_app) as url,
    ):

        def check():
            page.open(f"{url}/dashboard")
            page.until(lambda: "API key required" in page.state())
            for typed, state in (("wrong", "unknown API key"), (KEY, "live")):
                page.sign_in(typed)
                page.until(lambda state=state: state in page.state())
            page.open(f"{url}/dashboard")
            page.until(lambda: page.state() == "live")
            assert not page.by("sign-in").is_displayed()

        await asyncio.to_thread(check)


async def test_page_shows_a_tenant_its_own_charts(page):
    keys = {"api_keys_sha256": [hashlib.sha256(KEY.encode()).hexdigest()]}
    async with running_routers(**keys) as running, listening(running.public_app) as url:
        body = {"model": "chat", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
        headers = {"authorization": f"Bearer {KEY}"}
        stopped = asyncio.Event()

        async def send_requests():
            while not stopped.is_set():
                await asgi.post(running.public_app, CHAT, body, headers=headers)

        def check():
            page.open(f"{url}/dashboard")
            page.until(lambda: "API key required" in page.state())
            page.sign_in(KEY)
            for column in ("requests", "completion_tokens"):
                page.until(lambda column=column: page.number(column) > 1)
            page.until(lambda: page.tile("ttft_p90").endswith("s"))
            shown = [card.text for card in page.all("#charts .card:not(.shared) h2")]
            assert shown == [
                "Requests per second",
                "Tokens per second",
                "Time to first token (TTFT)",
                "Request duration",
                "Queue time in the router",
            ]
            assert not any(card.is_displayed() for card in page.all(".shared"))
            assert "Requests of tenant" in page.by("note").text

        sending = asyncio.create_task(send_requests())
        try:
            await asyncio.to_thread(check)
        finally:
            stopped.set()
            await sending


async def test_page_shows_spend_against_budgets(page, tmp_path):
    async with (
        gateway_of_acme(tmp_path) as (gateway, acme),
        listening(GatewayApp(gateway)) as url,
    ):
        gateway.budgets.add(acme, 2.0)

        def check():
            page.open(f"{url}/dashboard", width=360)
            page.until(lambda: page.by("sign-in").is_displayed())
            page.sign_in("key")
            page.until(lambda: page.by("budgets-card").is_displayed())
            rows = [row[:6] for row in page.rows("budgets")]
            assert rows == [
                ["acme", DIGEST[:16], "month", "2", "3", "67 %"],
                ["acme", "all", "day", "2", "1.5", "133 % (spent)"],
            ]
            assert page.script("document.documentElement.scrollWidth") <= 360

        await asyncio.to_thread(check)
