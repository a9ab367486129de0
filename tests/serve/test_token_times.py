"""TTFT and ITL of responses that are not streamed, from the engine to metrics and autoscaling."""

from cluster.autoscaling.reports import parse_reports
from cluster.gateway import GatewayApp
from tests import asgi
from tests.serve.test_adapters import a_world


async def test_metrics_and_autoscaling_know_the_token_times_of_whole_responses() -> None:
    async with a_world(1, "", max_loras=1, decode_s_per_token=0.01) as world:
        world.gateway.load_report(100.0, 1.0)
        answer = await world.ask("m", max_tokens=11)
        assert answer.json()["usage"]["completion_tokens"] == 11
        metrics = (await asgi.get(GatewayApp(world.gateway), "/metrics")).body.decode()
        values = dict(
            line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#")
        )
        assert float(values['tandem_ttft_seconds_count{model="m"}']) == 1
        assert float(values['tandem_itl_seconds_count{model="m"}']) == 10
        # Ten steps of 0.01 s, which may make up for 0.05 s of lag.
        assert float(values['tandem_itl_seconds_sum{model="m"}']) > 0.04
        report = parse_reports(world.gateway.load_report(101.0, 1.0))["m"]
    assert report.latencies["ttft_p90_s"].samples == 1
    assert report.latencies["itl_p90_s"].samples == 10
