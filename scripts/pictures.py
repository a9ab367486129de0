#!/usr/bin/env python3
"""Takes docs/images/dashboard-*.png anew: PYTHONPATH=. python scripts/pictures.py

Starts a cluster of simulated engines with a home and ports of its own, puts load on it until the
page's five minutes are full, looks at it in headless Chromium (Debian's chromium and
chromium-driver), and ends it.
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
"""Seconds, and how many streams at a time; then from the beginning."""
FULL_S = 280
"""So much of the past a picture has; where the machine was held up, the page begins anew."""
WAIT_S = 1200
SIM = {
    "prefill_s_per_token": 0.001,
    "decode_s_per_token": 0.03,
    "batch_slowdown": 0.05,
    "num_kv_blocks": 120,
    "block_size_tokens": 16,
    "fail_rate": 0.005,
}
COLORS = 128
"""A page has few; a picture of so many is a third as large."""


def config():
    """Two generators, of which one follows its load, behind two routers."""
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
async def running():
    """The cluster's HTTP address."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        isolated = isolated_home(home)
        file = home / "pictures.yaml"
        file.write_text(yaml.safe_dump(config()), encoding="utf-8")

        def tandem(*words):
            subprocess.run([TANDEM, *words], env=isolated.env, cwd=ROOT, check=True)

        try:
            await asyncio.to_thread(tandem, "up", "-d", "--config", str(file), *isolated.settings)
            yield isolated.http_url
        finally:
            await asyncio.to_thread(tandem, "down")


async def stream(http, number):
    """One chat after the other, of different lengths; now and then for an unknown model."""
    turn = number
    while True:
        turn += 1
        words = " ".join(f"word{number}" for _ in range(10 + turn * 7 % 60))
        body = {
            "model": "nobody" if turn % 40 == 0 else "draft" if number % 4 == 1 else "chat",
            "messages": [{"role": "user", "content": words}],
            "max_tokens": 20 + turn * 5 % 60,
            "stream": True,
        }
        with suppress(httpx.HTTPError):
            await http.post("/v1/chat/completions", json=body)


async def put_load(http):
    """Load as ``LOAD`` says, until it is cancelled."""
    async with asyncio.TaskGroup() as group:
        streams = []
        for seconds, wanted in cycle(LOAD):
            while len(streams) > wanted:
                streams.pop().cancel()
            missing = range(len(streams), wanted)
            streams += [group.create_task(stream(http, number)) for number in missing]
            await asyncio.sleep(seconds)


def take(url):
    """Write a picture of each kind of page."""
    with tempfile.TemporaryDirectory() as profile:
        driver = start(profile)
        try:
            page = Page(driver)
            for name, (scheme, width) in PAGES.items():
                page.open(f"{url}/dashboard", scheme, width)
                page.until(lambda: page.script(f"last - kept.times[0] >= {FULL_S}"), WAIT_S)
                (IMAGES / f"dashboard-{name}.png").write_bytes(picture(page))
        finally:
            driver.quit()


def picture(page):
    """The whole page as PNG with a palette."""
    width, height = page.script("[innerWidth, document.body.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = {"captureBeyondViewport": True, "format": "png", "clip": clip}
    found = page.driver.execute_cdp_cmd("Page.captureScreenshot", shot)
    image = Image.open(io.BytesIO(base64.b64decode(found["data"]))).convert("RGB")
    written = io.BytesIO()
    image.quantize(COLORS, dither=Image.Dither.NONE).save(written, "png", optimize=True)
    return written.getvalue()


async def main():
    """Take all pictures."""
    async with running() as url, httpx.AsyncClient(base_url=url, timeout=120) as http:
        load = asyncio.create_task(put_load(http))
        try:
            await asyncio.to_thread(take, url)
        finally:
            load.cancel()
            await asyncio.wait([load])


if __name__ == "__main__":
    asyncio.run(main())
