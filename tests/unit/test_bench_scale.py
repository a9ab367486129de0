"""``bench scale`` without clusters: small fleets, and the report of a scripted measurement."""

import pytest

from benchmarks.__main__ import make_parser
from benchmarks.endpoint import TargetError
from benchmarks.report import Report
from benchmarks.scale import decisions, live, run


def measure(*options: str) -> Report:
    args = make_parser().parse_args(["scale", "--quick", *options])
    args.rounds = 1
    return run(args)


def test_decisions_and_policies_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "NUM_REPLICAS", (10, 20))
    report = measure(
        *("--part", "decisions", "simulated", "--decisions", "20", "--blocks", "1024"),
        *("--replicas", "8", "--simulated-s", "4"),
    )
    assert report.keys["decision_us_p50_20_replicas"].median > 0
    policies = {key for key in report.keys if key.startswith("simulated_ttft_p90_s_")}
    assert "simulated_ttft_p90_s_prefix" in policies
    assert len(policies) > 3
    assert 0 < report.keys["simulated_hit_rate_prefix"].median < 1


def test_a_live_cluster_is_reported_by_role(monkeypatch: pytest.MonkeyPatch) -> None:
    result = live.LiveResult(1000.0, {"router": 4.0, "engine": 2.0}, {"gcs": 0.1}, 200.0, 30.0)
    shapes: list[tuple[int, int]] = []
    monkeypatch.setattr(
        live, "_measure_cluster", lambda *shape: (shapes.append(shape[:2]), result)[1]
    )
    report = measure("--part", "live")
    assert shapes == [(1, 2)]
    assert report.keys["cpu_us_per_token_1x2"].median == 6
    assert report.keys["router_pss_mb_1x2"].median == 200


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("ray::ServeController.run_control_loop", "controller"),
        ("/x/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp", "gcs"),
        ("/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp", "raylet"),
        ("ray::ServeReplica:tandem:router", "router"),
        ("python -m something", "rest"),
    ],
)
def test_processes_have_roles(command: str, role: str) -> None:
    assert live.role_of(command) == role


@pytest.mark.parametrize("text", ["4", "x8", "0x8", "4xmany"])
def test_a_wrong_shape_is_named(text: str) -> None:
    with pytest.raises(TargetError, match="is not of the form ROUTERSxREPLICAS"):
        live.parse_shape(text)
