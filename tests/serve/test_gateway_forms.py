"""Multipart forms through a gateway, as ``/v1/audio`` gets them."""

from typing import Any

from cluster.asgi import Receive, Scope, Send
from tests import asgi
from tests.serve.gateway_kit import World, gateway_world, read_body

PATH = "/v1/audio/transcriptions"
OTHER = {"name": "other", "model": "m", "fallbacks": ["gen"]}


class Recorder:
    """Application that keeps the bodies it gets."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.bodies.append(await read_body(receive))
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})


async def post(world: World, *fields: tuple[str, str], boundary: str = "Aa1") -> asgi.Answer:
    parts = [("file", "}--\r\n\r\n{"), *fields]
    body = "".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in parts
    )
    content_type = {"content-type": f"multipart/form-data; boundary={boundary}"}
    content = f"{body}--{boundary}--\r\n".encode()
    return await asgi.post(world.app, PATH, content, headers=content_type)


async def two_models(world: World) -> dict[str, Recorder]:
    found: dict[str, Recorder] = {}
    for name in ("gen", "other"):
        found[name] = Recorder()
        await world.serve(found[name], name, f"{name}-1", (PATH,))
    return found


def message(answer: asgi.Answer) -> Any:
    return answer.json()["error"]["message"]


async def test_the_form_names_the_model() -> None:
    async with gateway_world(more_generators=[OTHER]) as world:
        models = await two_models(world)
        for name in ("gen", "other"):
            answer = await post(world, ("model", name), ("language", "en"))
            assert answer.status == 200
            (body,) = models[name].bodies
            assert body.startswith(b"--Aa1\r\n")
            assert body.endswith(b"en\r\n--Aa1--\r\n")


async def test_a_form_without_a_known_model_is_refused() -> None:
    async with gateway_world(more_generators=[OTHER]) as world:
        models = await two_models(world)
        unknown = await post(world, ("model", "auto"))
        assert unknown.status == 404
        unnamed = await post(world)
        assert unnamed.status == 400
        assert "set `model` to one of: gen, other" in message(unnamed)
        twice = await post(world, ("model", "gen"), ("model", "other"))
        assert twice.status == 400
        assert "several fields `model`" in message(twice)
        assert not any(model.bodies for model in models.values())


async def test_the_only_model_need_not_be_named() -> None:
    async with gateway_world() as world:
        recorder = Recorder()
        await world.serve(recorder, "gen", "gen-1", (PATH,))
        assert (await post(world)).status == 200
        assert len(recorder.bodies) == 1
