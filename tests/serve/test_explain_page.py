"""Explain page in a real browser, with a real router, link and engine."""

import asyncio
import hashlib
from contextlib import asynccontextmanager

import pytest
from selenium.webdriver.support.ui import Select

from cluster.config import parse
from cluster.engines.classifier.engine import ClassifierEngine
from cluster.gateway import Gateway, GatewayApp, ReplicaInfo, Wiring
from cluster.link import LinkServer
from tests import asgi
from tests.serve.browser import Page, listening, start
from tests.serve.planted import LABEL_OF_WORD

SECRET = b"s" * 32
WIRINGS = {name: Wiring(SECRET) for name in ("gen", "mine")}
KEY = "open sesame"


def config(**router):
    return parse(
        {
            "generators": [{"name": "gen", "model": "m", "engine": "sim"}],
            "classifiers": [{"name": "mine", "model": "m", "threads": 1, "dtype": "float32"}],
            "router": router,
        }
    )


@asynccontextmanager
async def explain_page(path, **router):
    """Yield the URL of the page of a router with one real classifier."""
    tree = config(**router)
    engine = ClassifierEngine(tree.classifiers[0], str(path))
    await engine.start()
    link = LinkServer(engine.app, SECRET)
    host, port = await link.start()
    gateway = Gateway(tree, WIRINGS)
    gateway.pools["mine"].update([ReplicaInfo("mine-1", host, port, engine.routes())])
    try:
        async with listening(GatewayApp(gateway)) as url:
            yield f"{url}/explain"
    finally:
        await gateway.close()
        await link.stop()
        await engine.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = start(tmp_path_factory.mktemp("chromium"))
    yield ExplainPage(driver)
    driver.quit()


class ExplainPage(Page):
    """Form and result of the page."""

    def explain(self, text, method="integrated_gradients"):
        self.driver.execute_script(
            "arguments[0].value = arguments[1]", self.by("explain-text"), text
        )
        Select(self.by("explain-method")).select_by_value(method)
        self.by("explain-go").click()
        self.until(self.by("explain-go").is_enabled)
        return self.by("explain-status").text

    def words(self):
        spans = self.all("#words .word")
        return [(span.text, float(span.get_attribute("data-value"))) for span in spans]

    def bars(self):
        return self.all("#bars .bar")


async def test_words_are_colored_by_their_contribution(trained, browser):
    text = "word1 \U0001f600 <b>refund</b> word2"

    def use(url):
        browser.open(url)
        assert Select(browser.by("explain-model")).first_selected_option.text == "mine"
        assert browser.explain(text) == ""
        assert browser.by("words").text == text
        values = dict(browser.words())
        assert max(values, key=lambda word: abs(values[word])) == "refund"
        assert values["refund"] > 0
        names = [bar.text.split("\n")[0] for bar in browser.bars()]
        assert names == ["complaint", "praise"]
        assert browser.bars()[0].get_attribute("aria-pressed") == "true"
        browser.bars()[1].click()
        assert dict(browser.words())["refund"] == pytest.approx(-values["refund"], rel=0.05)
        assert "The contributions add up" in browser.by("explain-note").text
        assert browser.explain(text, "rollout") == ""
        assert min(value for _, value in browser.words()) > 0
        assert "independent of the label" in browser.by("explain-note").text
        assert browser.explain(text, "") == ""
        assert len(browser.bars()) == 2
        assert not browser.by("words").is_displayed()

        assert browser.loads_only_from(url.removesuffix("/explain"))
        assert browser.driver.get_log("browser") == []

    async with explain_page(trained[0]) as url:
        await asyncio.to_thread(use, url)


async def test_page_has_light_and_dark_schemes_and_fits_a_phone(trained, browser):
    def use(url):
        colors = []
        for scheme in ("light", "dark"):
            browser.open(url, scheme, width=360)
            assert browser.explain("thanks " + "very" * 60) == ""
            assert browser.script("document.documentElement.scrollWidth") <= 360
            colors.append(browser.colors())
        (light_page, light_text), (dark_page, dark_text) = colors
        assert light_page > 200 > 60 > light_text
        assert dark_page < 60 < 200 < dark_text

    async with explain_page(trained[0]) as url:
        await asyncio.to_thread(use, url)


async def test_page_shows_errors_and_accepts_a_key(trained, browser):
    def use(url):
        browser.open(url)
        assert "API key" in browser.explain("thanks")
        assert "bad" in browser.by("explain-status").get_attribute("class")
        browser.sign_in(KEY)
        assert browser.explain("thanks") == ""
        assert dict(browser.words()).keys() <= LABEL_OF_WORD.keys()

    async with explain_page(
        trained[0], api_keys_sha256=[hashlib.sha256(KEY.encode()).hexdigest()]
    ) as url:
        await asyncio.to_thread(use, url)


async def test_page_needs_no_key_and_loads_nothing_from_elsewhere():
    gateway = Gateway(config(api_keys_sha256=["0" * 64]), WIRINGS)
    answer = await asgi.get(GatewayApp(gateway), "/explain")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "<option>mine</option>" in answer.body.decode()
    assert "gen</option>" not in answer.body.decode()
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert (await asgi.post(GatewayApp(gateway), "/explain", {})).status == 405
    await gateway.close()
