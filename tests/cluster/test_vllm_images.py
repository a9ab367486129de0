"""Images in requests to vLLM's real frontend: what reaches the engine, and what is refused."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from cluster.config import GeneratorConfig
from cluster.engines.vllm.engine import VllmEngine
from cluster.metrics import Registry, table
from cluster.models import store
from tests import asgi
from tests.cluster.images import CHAT, MESSAGES, RESPONSES, body, bomb, data_url, png
from tests.cluster.malformed import problem_of
from tests.cluster.scripted_vllm import ScriptedCore, scripted_engine
from tests.cluster.tiny_idefics import IMAGE_TOKENS, WRAPPING_TOKENS, make_tiny_idefics
from tests.serve.gateway_kit import World, gateway_world
from tests.serve.test_media_fetch import ok, redirect, serving

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "images.md"
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # vLLM's imports warn
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scripted(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[VllmEngine, ScriptedCore]]:
    model: Path = tmp_path_factory.mktemp("model")
    make_tiny_idefics(model, store.resolve("smollm2-135m-instruct"))
    async with scripted_engine(model, name="gen") as (engine, core):
        core.script = lambda request: "Red"
        yield engine, core


@pytest.fixture
def engine(scripted: tuple[VllmEngine, ScriptedCore]) -> VllmEngine:
    return scripted[0]


@pytest.fixture
def core(scripted: tuple[VllmEngine, ScriptedCore]) -> ScriptedCore:
    return scripted[1]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(scripted: tuple[VllmEngine, ScriptedCore]) -> AsyncIterator[World]:
    engine, _ = scripted
    async with gateway_world(routing="least-load") as world:
        await world.serve(engine.app, "gen", "gen-1", engine.routes())
        yield world


def pool(**media: Any) -> GeneratorConfig:
    return GeneratorConfig.model_validate({"name": "gen", "model": "unused", "media": media})


async def image_hash(world: World, core: ScriptedCore, url: str) -> str:
    """Return vLLM's hash of the content of an image that reaches the engine."""
    answer = await asgi.post(world.app, CHAT, body(CHAT, url))
    assert answer.status == 200, answer.body
    (feature,) = core.requests[-1].mm_features
    return str(feature.mm_hash)


async def refused(world: World, path: str, request: dict[str, Any], status: int = 400) -> str:
    """Return the message of an error in the format of the API."""
    answer = await asgi.post(world.app, path, request)
    assert answer.status == status, answer.body
    assert problem_of(path, answer.status, answer.headers, answer.body) is None
    return str(answer.json()["error"]["message"])


def prompt_tokens(answer: asgi.Answer) -> int:
    usage = answer.json()["usage"]
    return int(usage.get("prompt_tokens") or usage.get("input_tokens"))


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
async def test_images_arrive_unchanged(world: World, core: ScriptedCore, path: str) -> None:
    used = []
    urls = [data_url(png("red")), data_url(png("blue"))]
    for count in range(3):
        answer = await asgi.post(world.app, path, body(path, *urls[:count]))
        assert answer.status == 200, answer.body
        used.append(prompt_tokens(answer))
        seen = [feature.mm_hash for feature in core.requests[-1].mm_features or ()]
        assert seen == [await image_hash(world, core, url) for url in urls[:count]]
    image = IMAGE_TOKENS + WRAPPING_TOKENS
    assert [used[1] - used[0], used[2] - used[1]] == [image, image]
    assert len({await image_hash(world, core, url) for url in urls}) == 2


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
async def test_by_default_no_url_is_fetched(world: World, path: str) -> None:
    async with serving({"/a.png": ok(png("red"))}) as server:
        url = f"http://127.0.0.1:{server.port}/a.png"
        assert "does not fetch URLs" in await refused(world, path, body(path, url))
        assert not server.requests


async def test_images_of_allowed_hosts_are_fetched(
    world: World, engine: VllmEngine, core: ScriptedCore
) -> None:
    def counted(outcome: str) -> float:
        registry = Registry()
        engine.observe(registry)
        return registry.counter(table.MEDIA_FETCHES, "gen", outcome).value

    before = {outcome: counted(outcome) for outcome in ("ok", "refused", "failed")}
    image = png("green")
    paths = {"/a.png": ok(image), "/b": redirect("/a.png"), "/evil": redirect("http://127.0.0.9/")}
    async with serving({**paths, "/html": ok(b"<html>")}) as server:
        host = f"127.0.0.1:{server.port}"
        await engine.reconfigure(pool(allowed_domains=[host], allowed_networks=["127.0.0.1/32"]))
        by_data = await image_hash(world, core, data_url(image))
        for name in ("a.png", "b"):
            assert await image_hash(world, core, f"http://{host}/{name}") == by_data
        message = await refused(world, CHAT, body(CHAT, f"http://{host}/evil"))
        assert "not allowed" in message
        message = await refused(world, CHAT, body(CHAT, f"http://{host}/html"))
        assert "not an image" in message
        await engine.reconfigure(pool(allowed_domains=[host]))
        message = await refused(world, CHAT, body(CHAT, f"http://{host}/a.png"))
        assert "no public address" in message
    await engine.reconfigure(pool())
    assert {outcome: counted(outcome) - n for outcome, n in before.items()} == {
        **{"ok": 3, "refused": 2},
        "failed": 0,
    }


BAD_DATA = {
    "no comma": "data:image/png;base64",
    "not base64": "data:image/png;base64,!!!!",
    "text": "data:text/plain,hello",
    "not an image": data_url(b"%PDF-1.7 nothing"),
    "SVG": data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
    "cut off": data_url(png("red")[:40]),
    "a file": "file:///etc/passwd",
    "nothing": "nonsense",
    "pixel bomb": data_url(bomb(10_000, 10_000)),
    "larger pixel bomb": data_url(bomb(100_000, 100_000)),
}


@pytest.mark.parametrize("case", BAD_DATA)
async def test_bad_images_are_400(world: World, core: ScriptedCore, case: str) -> None:
    await refused(world, CHAT, body(CHAT, BAD_DATA[case]))
    assert await image_hash(world, core, data_url(png("red")))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "http://127.0.0.1/v.mp4"}},
        {"type": "audio_url", "audio_url": {"url": "http://127.0.0.1/a.wav"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    ],
    ids=lambda part: part["type"],
)
async def test_kinds_that_the_model_does_not_take_are_400(world: World, part: Any) -> None:
    request = body(CHAT)
    request["messages"][0]["content"].append(part)
    await refused(world, CHAT, request)


async def test_limits_of_size_number_and_pixels(
    world: World, engine: VllmEngine, core: ScriptedCore
) -> None:
    image = data_url(png("red", side=64))
    await engine.reconfigure(pool(max_bytes=1024, max_pixels=64 * 64))
    assert await image_hash(world, core, image)
    large = data_url(png("red") + bytes(2000))
    assert "media.max_bytes" in await refused(world, CHAT, body(CHAT, large))
    many = data_url(png("red", side=65))
    assert "media.max_pixels" in await refused(world, CHAT, body(CHAT, many))
    await engine.reconfigure(pool())
    assert await refused(world, CHAT, body(CHAT, *[image] * 17))
    kwargs = {"mm_processor_kwargs": {"size": {"longest_edge": 100_000}}}
    assert await refused(world, CHAT, body(CHAT, image, **kwargs))


async def test_the_requests_of_the_guide(world: World) -> None:
    blocks = re.findall(r"^```json\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    assert len(blocks) == 3
    for path, block in zip((CHAT, RESPONSES, MESSAGES), blocks, strict=True):
        answer = await asgi.post(world.app, path, {**json.loads(block), "model": "gen"})
        assert answer.status == 200, answer.body
        assert prompt_tokens(answer) > IMAGE_TOKENS
