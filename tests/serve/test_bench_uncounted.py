"""The router of ``bench metrics``, which counts only requests without a certain header."""

from benchmarks.metrics.uncounted import HEADER, switched
from tests import asgi
from tests.serve.gateway_kit import CHAT, gateway_world, metrics


async def test_requests_with_the_header_are_answered_and_not_counted() -> None:
    body = {"model": "gen", "stream": True}
    with switched():
        async with gateway_world() as world:
            await world.add("gen", "gen-1")
            call = asgi.start(world.app, "POST", CHAT, body, headers=dict([HEADER]))
            assert (await call.done()).status == 200
            found = await metrics(world)
            assert not [series for series in found if series[0] == "tandem_requests_total"]
            assert not found["tandem_ttft_seconds_count", "gen"]
            call = asgi.start(world.app, "POST", CHAT, body)
            assert (await call.done()).status == 200
            found = await metrics(world)
            assert found["tandem_ttft_seconds_count", "gen"] == 1
