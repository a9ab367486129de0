"""Model names with a slash, and aliases, through the router to a simulated engine."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.admission.keys import digest
from cluster.config import GeneratorConfig
from cluster.engines.sim import SimEngine
from cluster.key_file import KeyFile
from tests import asgi
from tests.serve.classifier_kit import ask, refused, running, save
from tests.serve.gateway_kit import CHAT, REQUESTS_TOTAL, World, gateway_world, metrics

NAME, ALIASES, ADAPTER = "org/chat:1b", ["gpt-4o", "acme/models/chat"], "org/law"
MODELS = [NAME, *ALIASES, ADAPTER, "cls"]
GENERATOR: dict[str, Any] = {
    "name": NAME, "model": "m", "engine": "sim", "aliases": ALIASES, "adapters": {ADAPTER: "path"},
}  # fmt: skip


@asynccontextmanager
async def sim_world(key_file: KeyFile | None = None) -> AsyncIterator[World]:
    engine = SimEngine(GeneratorConfig.model_validate(GENERATOR))
    await engine.start()
    async with gateway_world(key_file, generator=GENERATOR) as world:
        await world.serve(engine.app, NAME, "chat-1", engine.routes())
        yield world
    await engine.stop()


async def chat(world: World, model: str, key: str = "") -> asgi.Answer:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    return await asgi.call(world.app, "POST", CHAT, body, headers={"x-api-key": key})


@pytest.mark.parametrize(
    ("asked", "answered"),
    [(NAME, NAME), *((alias, NAME) for alias in ALIASES), (ADAPTER, ADAPTER)],
)
async def test_an_alias_is_answered_and_counted_under_the_name(asked: str, answered: str) -> None:
    async with sim_world() as world:
        answer = await chat(world, asked)
        assert (answer.status, answer.json()["model"]) == (200, answered)
        assert (await metrics(world))[REQUESTS_TOTAL, NAME, CHAT, "200"] == 1
        assert not any(alias in labels for labels in await metrics(world) for alias in ALIASES)


async def test_models_lists_every_name_and_finds_names_with_slashes() -> None:
    async with sim_world() as world:
        cards = (await asgi.get(world.app, "/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == MODELS
        assert [card["root"] for card in cards] == [NAME, NAME, NAME, ADAPTER, "cls"]
        for name in MODELS:
            assert (await asgi.get(world.app, f"/v1/models/{name}")).json()["id"] == name
        missing = await asgi.get(world.app, "/v1/models/org/none")
        assert missing.status == 404
        assert "`org/none` does not exist" in missing.json()["error"]["message"]


@pytest.mark.parametrize("listed", [NAME, ALIASES[0]])
async def test_a_key_for_one_name_of_a_model_allows_all_of_them(
    tmp_path: Path, listed: str
) -> None:
    keys = {"keys": [{"sha256": digest("k"), "tenant": "t", "models": [listed]}]}
    path = tmp_path / "keys.yaml"
    path.write_text(json.dumps(keys))
    async with sim_world(KeyFile(path, expected=True)) as world:
        assert [(await chat(world, name, "k")).status for name in [NAME, *ALIASES]] == [200] * 3
        refused = await chat(world, ADAPTER, "k")
        assert refused.status == 403
        assert f"`{ADAPTER}`" in refused.json()["error"]["message"]
        cards = await asgi.call(world.app, "GET", "/v1/models", headers={"x-api-key": "k"})
        assert [card["id"] for card in cards.json()["data"]] == [NAME, *ALIASES]


async def test_classifiers_have_aliases(tmp_path: Path) -> None:
    saved = save(tmp_path, "bert", "ForSequenceClassification")
    async with running(saved, "classify", aliases=("org/best",)) as engine:
        for model in ("org/best", "tiny"):
            answer = await ask(engine, "/classify", {"model": model, "input": "good"})
            assert answer["model"] == "tiny"
        error = await refused(engine, "/classify", {"model": "org/other", "input": "good"}, 404)
        assert "org/other" in error["message"]
