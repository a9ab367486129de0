#!/usr/bin/env python3
"""Take the screenshots of the router's pages: ``PYTHONPATH=.:scripts python scripts/pictures.py``.

``pictures.py dashboard`` starts an isolated cluster of simulated engines and runs load until the
page's five-minute charts are full. ``pictures.py playground`` starts the default models and asks
them. Without an argument, both. The screenshots in docs/images are taken in headless Chromium
(Debian packages chromium and chromium-driver).
"""

import asyncio
import base64
import io
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import cycle
from pathlib import Path

import httpx
import yaml
from PIL import Image
from selenium.webdriver.common.keys import Keys

from cluster.models import store
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
DASHBOARDS = {"light": ("light", 1100), "dark": ("dark", 1100), "phone": ("dark", 360)}
PLAYGROUNDS = {"light": ("light", 1100), "dark": ("dark", 1100), "phone": ("light", 360)}
"""Color scheme and width of each screenshot."""
LOAD = ((50, 3), (90, 24), (70, 8), (80, 30), (20, 14))
"""Duration in seconds and number of concurrent streams of each phase, repeated."""
TOP_HEIGHT = 780
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


SYSTEM_PROMPT = "Answer in one or two sentences."
QUESTIONS = ("What is the capital of France?", "Name three things to see there.")
REVIEW = "The plot is thin, but the actors are wonderful and I laughed a lot."


def dashboard_config():
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


def playground_config():
    """Return the default configuration with a second generator, prices and estimated energy."""
    config = yaml.safe_load((ROOT / "ray-config.yaml").read_text(encoding="utf-8"))
    args = config["applications"][0]["args"]
    (generator,) = args["generators"]
    fixed = {"replicas": {"min": 1, "max": 1}, "resources": {"cpus": 0.3}}
    precise = {"name": f"{generator['name']}-float32", "dtype": "float32"}
    args["generators"] = [{**generator, **fixed}, {**generator, **fixed, **precise}]
    args["accounting"] = {"per_cpu_hour": 0.04, "watts_per_core": 8}
    return config


@asynccontextmanager
async def running_cluster(config):
    """Start a cluster and yield its HTTP address."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "models").symlink_to(store.models_dir())
        isolated = isolated_home(home)
        file = home / "pictures.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")

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


@contextmanager
def browser():
    """Start a browser and yield its page."""
    with tempfile.TemporaryDirectory() as profile:
        driver = start(profile)
        try:
            yield Page(driver)
        finally:
            driver.quit()


def take_dashboard(url):
    """Write a screenshot of each variant of the dashboard."""
    with browser() as page:
        for name, (scheme, width) in DASHBOARDS.items():
            page.open(f"{url}/dashboard", scheme, width)
            page.until(lambda: page.script(f"last - kept.times[0] >= {CHART_S}"), WAIT_S)
            save(page, f"dashboard-{name}")
    with Image.open(IMAGES / "dashboard-light.png") as light:
        top = light.crop((0, 0, light.width, TOP_HEIGHT))
        top.save(IMAGES / "dashboard-top.png", optimize=True)


def take_playground(url):
    """Write the screenshots of the playground, and one of the explain page."""
    with browser() as page:
        for name, (scheme, width) in PLAYGROUNDS.items():
            page.open(f"{url}/playground", scheme, width)
            page.until(lambda: page.script("conversations[1].select.known"))
            if name != "phone":
                page.by("compare").click()
            page.driver.execute_script(
                "arguments[0].value = arguments[1]", page.by("system"), SYSTEM_PROMPT
            )
            for question in QUESTIONS:
                page.by("message").send_keys(question + Keys.ENTER)
                page.until(lambda: page.by("status").text == "Answered.", WAIT_S)
            page.driver.execute_script("document.activeElement.blur()")
            save(page, f"playground-{name}")
        page.open(f"{url}/explain", width=800)
        page.driver.execute_script(
            "arguments[0].value = arguments[1]", page.by("explain-text"), REVIEW
        )
        page.by("explain-go").click()
        page.until(lambda: page.all(".word"), WAIT_S)
        save(page, "explain")


def save(page, name):
    """Write the whole page as PNG with a palette."""
    width, height = page.script("[innerWidth, document.body.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    options = {"captureBeyondViewport": True, "format": "png", "clip": clip}
    captured = page.driver.execute_cdp_cmd("Page.captureScreenshot", options)
    image = Image.open(io.BytesIO(base64.b64decode(captured["data"]))).convert("RGB")
    png = io.BytesIO()
    image.quantize(COLORS, dither=Image.Dither.NONE).save(png, "png", optimize=True)
    (IMAGES / f"{name}.png").write_bytes(png.getvalue())


async def picture_dashboard():
    """Run simulated engines and load, and take the screenshots of the dashboard."""
    async with (
        running_cluster(dashboard_config()) as url,
        httpx.AsyncClient(base_url=url, timeout=120) as http,
    ):
        load = asyncio.create_task(run_load(http))
        try:
            await asyncio.to_thread(take_dashboard, url)
        finally:
            load.cancel()
            await asyncio.wait([load])


async def picture_playground():
    """Run the default models, and take the screenshots of the playground and the explain page."""
    async with running_cluster(playground_config()) as url:
        await asyncio.to_thread(take_playground, url)


async def main(*names):
    """Take the screenshots of the named pages; of all without names."""
    parts = {"dashboard": picture_dashboard, "playground": picture_playground}
    for name in names or parts:
        await parts[name]()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
