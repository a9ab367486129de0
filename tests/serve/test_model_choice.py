"""`model: auto` and fallback models, with scripted generators and classifiers behind real links."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cluster.key_file import KeyFile
from tests import asgi
from tests.serve.gateway_kit import World, gateway_world, metrics
from tests.serve.scripted_generator import (
    APIS,
    CHAT,
    ROUTES,
    ScriptedGenerator,
    request_for,
    streamed_text,
    text_of,
)
from tests.serve.test_guards import MAIL, PII, ScriptedClassifier, key_file

FALLBACK, CHOICE = "x-tandem-fallback", "x-tandem-model-choice"


class Site:
    """Router with the generators `gen` and `small`, whose answers are their names."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.app = world.app
        self.generators: dict[str, ScriptedGenerator] = {}
        self.classifier = ScriptedClassifier()

    async def add(self, name: str) -> None:
        generator = self.generators[name] = ScriptedGenerator(lambda _body: [name])
        await self.world.serve(generator, name, f"{name}-1", ROUTES)

    async def post(self, path: str, text: str = "x", **fields: Any) -> asgi.Answer:
        return await asgi.post(self.app, path, {**request_for(path, text), **fields})


@asynccontextmanager
async def site_with(
    generator: dict[str, Any] | None = None, without: tuple[str, ...] = (), **kit: Any
) -> AsyncIterator[Site]:
    small = {"name": "small", "model": "m", "aliases": ["tiny"]}
    async with gateway_world(
        generator=generator, more_generators=[small], classifier={"tasks": ["classify"]}, **kit
    ) as world:
        site = Site(world)
        for name in {"gen", "small"} - set(without):
            await site.add(name)
        await world.serve(site.classifier, "cls", "cls-1", ("/classify",))
        yield site


# -- fallbacks --


@pytest.mark.parametrize("path", APIS)
async def test_a_fallback_answers_for_a_model_without_replicas(path: str) -> None:
    async with site_with({"fallbacks": ["tiny"]}, without=("gen",), queue_timeout_s=0.05) as site:
        answer = await site.post(path)
        assert text_of(path, answer.json()) == "small"
        assert answer.headers[FALLBACK] == "gen=503"
        assert site.generators["small"].bodies[0]["model"] == "tiny"
        stream = await site.post(path, stream=True)
        assert streamed_text(path, stream.data()) == "small"
        found = await metrics(site.world)
        assert found["tandem_model_fallbacks_total", "small", "gen", "failure"] == 2


async def test_a_full_queue_is_an_overload_and_a_quota_is_not(tmp_path: Any) -> None:
    file = key_file(
        tmp_path,
        {"key": "k", "tenant": "t"},
        {"key": "poor", "tenant": "poor"},
        tenants={"poor": {"requests_per_minute": 1}},
    )
    generator = {"fallbacks": ["small"], "max_in_flight": 1}
    async with site_with(generator, key_file=file, max_queued=0) as site:

        async def post(key: str) -> asgi.Answer:
            headers = {"x-api-key": key}
            return await asgi.post(site.app, CHAT, request_for(CHAT, "x"), headers=headers)

        site.generators["gen"].begins.clear()
        first = asgi.start(
            site.app, "POST", CHAT, request_for(CHAT, "x"), headers={"x-api-key": "k"}
        )
        await site.world.until(lambda: bool(site.generators["gen"].bodies))
        second = await post("k")
        assert second.headers[FALLBACK] == "gen=429"
        site.generators["gen"].begins.set()
        assert FALLBACK not in (await first.done()).headers
        assert (await post("poor")).status == 200
        limited = await post("poor")
        assert limited.status == 429
        assert len(site.generators["small"].bodies) == 1


async def test_errors_of_the_request_have_no_fallback() -> None:
    async with site_with({"fallbacks": ["small"]}) as site:
        assert (await asgi.post(site.app, "/v1/nothing", {"model": "gen"})).status == 404
        assert (await asgi.post(site.app, CHAT, b'{"model": "gen"')).status == 400
        assert FALLBACK not in (await site.post(CHAT)).headers
        assert not site.generators["small"].bodies


async def test_the_first_error_is_returned_if_no_model_can_answer() -> None:
    async with site_with(
        {"fallbacks": ["small"]}, without=("gen", "small"), queue_timeout_s=0.05
    ) as site:
        answer = await site.post(CHAT)
        assert answer.status == 503
        assert "gen" in answer.json()["error"]["message"]


async def test_a_reason_that_is_not_configured_has_no_fallback() -> None:
    generator = {"fallbacks": ["small"], "fallback_on": ["overload"]}
    async with site_with(generator, without=("gen",), queue_timeout_s=0.05) as site:
        assert (await site.post(CHAT)).status == 503


async def test_a_prompt_that_one_models_guard_refuses_goes_to_another_model() -> None:
    guard = {**PII, "action": "block", "models": ["gen"], "checks": "prompt"}
    async with site_with({"fallbacks": ["small"]}, guards=[guard]) as site:
        answer = await site.post(CHAT, f"mail {MAIL}")
        assert text_of(CHAT, answer.json()) == "small"
        assert answer.headers[FALLBACK] == "gen=400"
        assert not site.generators["gen"].bodies
        assert text_of(CHAT, (await site.post(CHAT)).json()) == "gen"


async def test_a_key_gets_only_fallbacks_that_it_may_use(tmp_path: Any) -> None:
    file = key_file(tmp_path, {"key": "k", "tenant": "t", "models": ["gen"]}, tenants={})
    async with site_with(
        {"fallbacks": ["small"]}, without=("gen",), queue_timeout_s=0.05, key_file=file
    ) as site:
        body = request_for(CHAT, "x")
        answer = await asgi.post(site.app, CHAT, body, headers={"x-api-key": "k"})
        assert answer.status == 503


async def test_a_repeated_request_gets_the_answer_of_the_fallback() -> None:
    async with site_with({"fallbacks": ["small"]}, without=("gen",), queue_timeout_s=0.05) as site:
        headers = {"idempotency-key": "k"}
        first = await asgi.post(site.app, CHAT, request_for(CHAT, "x"), headers=headers)
        await site.add("gen")
        again = await asgi.post(site.app, CHAT, request_for(CHAT, "x"), headers=headers)
        assert again.json() == first.json()
        assert again.headers["idempotent-replayed"] == "true"
        assert not site.generators["gen"].bodies


# -- model: auto --

AUTO: dict[str, Any] = {
    "default": "small",
    "classifier": "cls",
    "timeout_s": 30,
    "rules": [
        {"model": "gen", "labels": ["BAD"]},
        {"model": "gen", "min_prompt_tokens": 100, "max_prompt_tokens": 1000},
    ],
}


@pytest.mark.parametrize("path", APIS)
async def test_rules_choose_the_model_and_a_header_explains_it(path: str) -> None:
    async with site_with(auto=AUTO) as site:
        expected = {
            "hello": ("small", "small; rule=default"),
            "a bad case": ("gen", "gen; rule=1; label=BAD 0.90"),
            "long " * 100: ("gen", "gen; rule=2; prompt_tokens=125"),
            "long " * 1000: ("small", "small; rule=default"),
        }
        for text, (model, header) in expected.items():
            answer = await site.post(path, text, model="auto")
            assert text_of(path, answer.json()) == model
            assert answer.headers[CHOICE] == header
            assert site.generators[model].bodies[-1]["model"] == model
        found = await metrics(site.world)
        assert found["tandem_auto_choices_total", "gen", "2"] == 1


async def test_without_a_label_the_other_rules_decide() -> None:
    async with site_with(auto=AUTO) as site:
        site.classifier.fails = True
        answer = await site.post(CHAT, "a bad case", model="auto")
        assert answer.headers[CHOICE] == "small; rule=default"


async def test_the_budget_and_the_models_of_a_key_limit_the_choice(tmp_path: Any) -> None:
    file: KeyFile = key_file(
        tmp_path,
        {"key": "k", "tenant": "t"},
        {"key": "none", "tenant": "free"},
        {"key": "small", "tenant": "free", "models": ["small"]},
        {"key": "gen", "tenant": "free", "models": ["gen"]},
        tenants={"t": {"tokens_per_day": 10}},
    )
    rules = [
        {"model": "small", "min_budget_used": 0.5},
        {"model": "gen", "min_prompt_tokens": 1},
    ]
    async with site_with(auto={"default": "small", "rules": rules}, key_file=file) as site:

        async def choice(key: str, text: str = "some text") -> str | int:
            body = {**request_for(CHAT, text), "model": "auto"}
            answer = await asgi.post(site.app, CHAT, body, headers={"x-api-key": key})
            return answer.headers.get(CHOICE, answer.status)

        assert str(await choice("k")).startswith("gen; rule=2")
        await site.world.until_idle()
        for _ in range(4):  # 3 prompt tokens each
            last = str(await choice("k"))
            await site.world.until_idle()
            if last.startswith("small; rule=1; budget_used="):
                break
        assert last.startswith("small; rule=1; budget_used=")
        assert str(await choice("none")).startswith("gen; rule=2")
        assert await choice("small") == "small; rule=default"
        assert await choice("gen", "x") == 403


async def test_without_the_section_auto_is_no_model() -> None:
    async with site_with() as site:
        assert (await site.post(CHAT, model="auto")).status == 404
