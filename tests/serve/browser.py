"""Pages in headless Chromium, and an HTTP server for them.

Requires Debian's packages chromium and chromium-driver; CI installs them.
"""

import asyncio
import os
import shutil
from contextlib import asynccontextmanager

import pytest
import uvicorn
from axe_core_python.selenium import Axe
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@asynccontextmanager
async def listening(app, port=0):
    """Serve ``app`` over HTTP and yield its address."""
    proxied = _cancelled_by_disconnects(app)
    config = uvicorn.Config(proxied, port=port, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(60):
            while not server.started:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


def _cancelled_by_disconnects(app):
    """Return ``app`` as Serve's proxy runs it: a client that disconnects cancels its request."""

    async def run(scope, receive, send):
        messages = asyncio.Queue()

        async def read():
            while (message := await receive())["type"] != "http.disconnect":
                await messages.put(message)
            responding.cancel()

        responding = asyncio.ensure_future(app(scope, messages.get, send))
        reading = asyncio.create_task(read())
        try:
            await asyncio.wait([responding])
        finally:
            reading.cancel()
        if not responding.cancelled():
            responding.result()

    return run


def start(profile):
    """Start a browser with a profile directory; skip the test if Chromium is not installed."""
    if not (CHROMIUM and DRIVER):
        if os.environ.get("CI"):
            pytest.fail("CI has no chromium and chromium-driver")
        pytest.skip("no chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(DRIVER))


class Page:
    """Page in a browser: open it, find elements, run scripts."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url, scheme="light", width=900, height=900):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(url)

    def by(self, name):
        return self.driver.find_element(By.ID, name)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def script(self, source):
        return self.driver.execute_script(f"return {source}")

    def until(self, condition, timeout_s=60):
        # The page may replace an element between the search for it and its use.
        ignored = [StaleElementReferenceException]
        waiting = WebDriverWait(self.driver, timeout_s, 0.1, ignored_exceptions=ignored)
        return waiting.until(lambda _: condition())

    def sign_in(self, key):
        """Enter an API key, for this and all other pages."""
        if not self.by("key").is_displayed():
            self.by("key-button").click()
        self.by("key").send_keys(key)
        self.by("sign-in").submit()

    def loads_only_from(self, url):
        """Return True if the page loaded something, and all of it from this address."""
        loaded = self.script("performance.getEntriesByType('resource').map(e => e.name)")
        return bool(loaded) and all(name.startswith(url) for name in loaded)

    def violations(self):
        """Return what axe-core finds: rule, and the elements that break it."""
        found = Axe().run(self.driver)["violations"]
        return [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found]

    def colors(self):
        """Return the brightness of the page's background and of its text, from 0 to 255."""
        style = "getComputedStyle(document.body)"
        return [brightness(self.script(f"{style}.{name}")) for name in ("backgroundColor", "color")]


def brightness(color):
    return sum(int(part) for part in color.strip("rgb()").split(",")) / 3
