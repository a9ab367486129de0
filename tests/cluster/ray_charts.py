"""Charts in Ray's dashboard: the pages in Chromium, and which panels have data."""

import base64
import contextlib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import httpx
from selenium.common.exceptions import TimeoutException, WebDriverException
from selenium.webdriver.common.by import By

from tests.serve.browser import Page, start

PICTURES = "TANDEM_PICTURES"
"""Variable with a directory; if set, the pages are saved there as ``ray-*.png``."""
RAYS_BOARDS = ("rayServeDashboard", "rayServeDeploymentDashboard", "rayServeLlmDashboard")
TABLE = Path(__file__).parents[2] / "docs" / "reference" / "ray-panels.md"
STATES = """
    const panels = [...document.querySelectorAll('.panel:not([hidden])')];
    return panels.map(panel => [panel.querySelector('h2').textContent, panel.dataset.state]);
"""
ATTEMPTS, TIMEOUT_S = 4, 60


class Browser:
    """Ray's dashboard in Chromium."""

    def __init__(self, url: str, profile: Path) -> None:
        self._url = url
        self.driver: Any = start(profile)
        self._page = Page(self.driver)

    def open(self, address: str, height: int = 2400) -> None:
        """Open a page: of Ray's dashboard (``#/serve``), or another address."""
        self._page.open("about:blank")
        full = address if address.startswith("http") else f"{self._url}/{address}"
        self._page.open(full, width=1400, height=height)

    def show_frames(self, address: str, frames: Mapping[str, Collection[str]]) -> None:
        """Open a page and wait until these panels have data, by the titles of their frames.

        The page asks only once whether there is a Grafana, so it is opened again if a slow machine
        gave no answer in time.
        """
        for _ in range(ATTEMPTS):
            self.open(address)
            with contextlib.suppress(TimeoutException):
                self._page.until(lambda: not self._without_data(frames), TIMEOUT_S)
                return
        raise AssertionError(f"{address}: no data in {self._without_data(frames)}")

    def _without_data(self, frames: Mapping[str, Collection[str]]) -> list[str]:
        return [frame for frame, titles in frames.items() if not self._has(frame, titles)]

    def _has(self, frame: str, titles: Collection[str]) -> bool:
        selector = f"iframe[title='{frame}']"
        try:  # the dashboard may replace a frame at any time
            self.driver.switch_to.frame(self.driver.find_element(By.CSS_SELECTOR, selector))
            return self._have_data(titles)
        except WebDriverException:
            return False
        finally:
            self.driver.switch_to.default_content()

    def wait_for_panels(self, titles: Collection[str]) -> None:
        """Wait until these panels of the page have data."""
        self._page.until(lambda: self._have_data(titles), 2 * TIMEOUT_S)

    def _have_data(self, titles: Collection[str]) -> bool:
        states = dict(self.driver.execute_script(STATES))
        return {states.get(title) for title in titles} == {"data"}

    def save(self, name: str) -> None:
        """Save the page if ``PICTURES`` is set."""
        if folder := os.environ.get(PICTURES):
            taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
            Path(folder, f"ray-{name}.png").write_bytes(base64.b64decode(taken["data"]))


def documented_panels() -> dict[tuple[str, str], str]:
    """Return the table of ``ray-panels.md``: "yes", "no: REASON" or "if CONDITION" by panel."""
    rows = re.findall(r"^\| (Serve[^|]*?) \| (.*?) \| (.*?) \|$", TABLE.read_text(), re.MULTILINE)
    return {(f"{board} Dashboard", title): text for board, title, text in rows}


def panels_with_data(charts_url: str) -> dict[tuple[str, str], bool]:
    """Return whether each of Ray's Serve and LLM panels has data, by dashboard and title."""
    found = {}
    with httpx.Client(base_url=charts_url, timeout=60) as client:
        for uid in RAYS_BOARDS:
            board = client.get(f"/data/dashboards/{uid}").raise_for_status().json()
            for panel in board["panels"]:
                if panel["kind"] == "row":
                    continue
                address = f"/data/panels/{uid}/{panel['id']}?from=now-5m&to=now"
                series = client.get(address).raise_for_status().json()["series"]
                values = (value for each in series for value in each["values"])
                has_data = any(value is not None for value in values)
                found[board["title"], panel["title"]] = has_data
    return found
