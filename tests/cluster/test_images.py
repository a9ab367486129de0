"""A real vision model sees the pixels of images, and its answers are handed over."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from cluster.config import GeneratorConfig
from cluster.engines.base import Engine
from cluster.engines.factory import make_generator_engine
from cluster.models import store
from tests import asgi
from tests.cluster.images import CHAT, MESSAGES, RESPONSES, body, data_url, png
from tests.cluster.test_handover import answers, content
from tests.cluster.tiny_idefics import make_tiny_idefics
from tests.serve.gateway_kit import World, gateway_world, metrics

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # vLLM's imports warn
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    model: Path = tmp_path_factory.mktemp("model")
    make_tiny_idefics(model, store.resolve("smollm2-135m-instruct"))
    fields = {"name": "gen", "model": str(model), "kv_cache_memory_bytes": "64MiB"}
    engine = make_generator_engine(GeneratorConfig.model_validate(fields))
    await engine.start()
    yield engine
    await engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(engine: Engine) -> AsyncIterator[World]:
    async with gateway_world(routing="least-load") as world:
        await world.serve(engine.app, "gen", "gen-1", engine.routes())
        yield world


async def first_logprob(world: World, url: str) -> float:
    answer = await asgi.post(world.app, CHAT, body(CHAT, url, logprobs=True))
    assert answer.status == 200, answer.body
    logprob: float = answer.json()["choices"][0]["logprobs"]["content"][0]["logprob"]
    return logprob


async def test_the_model_sees_the_pixels(world: World) -> None:
    red, blue = data_url(png("red")), data_url(png("blue"))
    seen = [await first_logprob(world, url) for url in (red, blue, red)]
    assert seen[0] == pytest.approx(seen[2], abs=1e-4)
    assert abs(seen[0] - seen[1]) > 1e-3


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
async def test_usage_and_metrics_count_the_same_tokens(world: World, path: str) -> None:
    await world.until_idle()
    before = (await metrics(world)).get(("tandem_prompt_tokens_total", "gen"), 0)
    answer = await asgi.post(world.app, path, body(path, data_url(png("red"))))
    assert answer.status == 200, answer.body
    await world.until_idle()
    counted = (await metrics(world))["tandem_prompt_tokens_total", "gen"] - before
    usage = answer.json()["usage"]
    assert counted == (usage.get("prompt_tokens") or usage.get("input_tokens"))


async def test_an_answer_about_an_image_is_handed_over(engine: Engine) -> None:
    request = body(CHAT, data_url(png("red")), max_tokens=30, ignore_eos=True)
    answer, undisturbed = await answers(engine, CHAT, request, 9)
    assert content(answer) == content(undisturbed)
