#!/usr/bin/env python3
"""Take the screenshots docs/images/dashboard-*.png: ``PYTHONPATH=. python scripts/pictures.py``.

Starts an isolated cluster of simulated engines and runs load until the page's five-minute charts
are full. Then takes the screenshots in headless Chromium (Debian packages chromium and
chromium-driver) and stops the cluster.
"""

import asyncio
import base64
import io
import subprocess
import tempfile
from contextlib import asynccontextmanager, suppress
from itertools import cycle
from pathlib import Path

import httpx
import yaml
from PIL import Image

from tests.cluster.conftest import (
    ROOT,
    TANDEM,
    isolated_home,
    router_config,
    serve_config,
    sim_generator,
)
from tests.serve.browser import Page, start

IMAGES = ROOT / "docs" / "images"
PAGES = {"light": ("light", 1100), "dark": ("dark", 1100), "phone": ("dark", 360)}
LOAD = ((50, 3), (90, 24), (70, 8), (80, 30), (20, 14))
"""Duration in seconds and number of concurrent streams of each phase, repeated."""
TOP_HEIGHT = 709
"""Height in pixels of README's picture: the figures and the first four charts."""
CHART_S = 280
"""Length of the charts in a screenshot; after a long stall, the page starts them again."""
WAIT_S = 1200
"""Longest wait for full charts."""
SIM = {
    "prefill_s_per_token": 0.001,
    "decode_s_per_token": 0.03,
    "batch_slowdown": 0.05,
    "num_kv_blocks": 120,
    "block_size_tokens": 16,
    "fail_rate": 0.005,
}
COLORS = 128
"""Palette size. The pages have few colors, and 128 reduce the file size to a third."""


def cluster_config():
    """Return the configuration: two generators, one of them autoscaled, and two routers."""
    small = {"resources": {"cpus": 0.01}}
    chat = {
        "replicas": {
            "min": 1,
            "max": 4,
            "target_in_flight": 6,
            "upscale_delay_s": 4,
            "downscale_delay_s": 20,
        }
    }
    generators = [
        sim_generator(name=name, sim=SIM, **small, **more)
        for name, more in (("chat", chat), ("draft", {}))
    ]
    return serve_config(generators=generators, router=router_config(2, **small))


@asynccontextmanager
async def running_cluster():
    """Start the cluster and yield its HTTP address."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        isolated = isolated_home(home)
        file = home / "pictures.yaml"
        file.write_text(yaml.safe_dump(cluster_config()), encoding="utf-8")

        def tandem(*arguments):
            subprocess.run([TANDEM, *arguments], env=isolated.env, cwd=ROOT, check=True)

        try:
            await asyncio.to_thread(tandem, "up", "-d", "--config", str(file), *isolated.settings)
            yield isolated.http_url
        finally:
            await asyncio.to_thread(tandem, "down")


async def send_chats(http, number):
    """Send chats of different lengths one after the other, a few of them to an unknown model."""
    turn = number
    while True:
        turn += 1
        words = " ".join(f"word{number}" for _ in range(10 + turn * 7 % 60))
        body = {
            "model": "unknown" if turn % 40 == 0 else "draft" if number % 4 == 1 else "chat",
            "messages": [{"role": "user", "content": words}],
            "max_tokens": 20 + turn * 5 % 60,
            "stream": True,
        }
        with suppress(httpx.HTTPError):
            await http.post("/v1/chat/completions", json=body)


async def run_load(http):
    """Run the phases of ``LOAD`` until cancelled."""
    async with asyncio.TaskGroup() as group:
        streams = []
        for seconds, num_streams in cycle(LOAD):
            while len(streams) > num_streams:
                streams.pop().cancel()
            missing = range(len(streams), num_streams)
            streams += [group.create_task(send_chats(http, number)) for number in missing]
            await asyncio.sleep(seconds)


def take_screenshots(url):
    """Write a screenshot of each page variant."""
    with tempfile.TemporaryDirectory() as profile:
        driver = start(profile)
        try:
            page = Page(driver)
            for name, (scheme, width) in PAGES.items():
                page.open(f"{url}/dashboard", scheme, width)
                page.until(lambda: page.script(f"last - kept.times[0] >= {CHART_S}"), WAIT_S)
                (IMAGES / f"dashboard-{name}.png").write_bytes(screenshot(page))
        finally:
            driver.quit()
    with Image.open(IMAGES / "dashboard-light.png") as light:
        top = light.crop((0, 0, light.width, TOP_HEIGHT))
        top.save(IMAGES / "dashboard-top.png", optimize=True)


def screenshot(page):
    """Return the whole page as PNG with a palette."""
    width, height = page.script("[innerWidth, document.body.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    options = {"captureBeyondViewport": True, "format": "png", "clip": clip}
    captured = page.driver.execute_cdp_cmd("Page.captureScreenshot", options)
    image = Image.open(io.BytesIO(base64.b64decode(captured["data"]))).convert("RGB")
    png = io.BytesIO()
    image.quantize(COLORS, dither=Image.Dither.NONE).save(png, "png", optimize=True)
    return png.getvalue()


async def main():
    """Run the cluster and the load, and take all screenshots."""
    async with running_cluster() as url, httpx.AsyncClient(base_url=url, timeout=120) as http:
        load = asyncio.create_task(run_load(http))
        try:
            await asyncio.to_thread(take_screenshots, url)
        finally:
            load.cancel()
            await asyncio.wait([load])


if __name__ == "__main__":
    asyncio.run(main())
