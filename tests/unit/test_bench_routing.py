import argparse
import math

import numpy as np
import pytest

from benchmarks import routing
from benchmarks.rounds import Summary
from benchmarks.routing.held_out import counted_s, vs_best
from benchmarks.routing.peers import RayPowerOfTwo, RayPrefixAffinity, VllmRouterCacheAware
from benchmarks.routing.traces import OracleRouting, ideal_ttft_p90_s
from cluster.routing import Fleet, Policy, RequestView
from cluster.simulation.requests import Trace, TraceRequest
from cluster.simulation.settings import LARGE_GPU

ENDS = (100.0, 200.0, 300.0)


def make_fleet(*names: str, capacity: int = 100) -> Fleet:
    fleet = Fleet()
    for name in names:
        fleet.add(name, capacity)
    return fleet


def make_request(*prefix: int) -> RequestView:
    return RequestView(ENDS[len(prefix) - 1], 10.0, prefix, ENDS[: len(prefix)])


def serve(fleet: Fleet, policy: Policy, request: RequestView) -> str | None:
    chosen = policy.choose(request, fleet)
    if chosen is not None:
        fleet.place(chosen, request)
    return chosen


def test_the_ideal_ttft_computes_only_new_blocks() -> None:
    def trace_request(
        at_s: float, blocks: tuple[int, ...], answer: tuple[int, ...] = ()
    ) -> TraceRequest:
        return TraceRequest(at_s, 100 * len(blocks), 10, blocks, answer)

    requests = [
        trace_request(0.0, (1, 2), (3,)),
        trace_request(1.0, (1, 2, 3)),
        trace_request(2.0, (1, 2, 3)),
    ]
    assert ideal_ttft_p90_s(Trace("t", requests[:1], 100)) == 200 * LARGE_GPU.prefill_s_per_token
    found = ideal_ttft_p90_s(Trace("t", requests, 100))
    # Two requests compute one token each, the first one 200; p90 interpolates.
    one_token_s = LARGE_GPU.prefill_s_per_token
    assert found == pytest.approx(np.percentile([200 * one_token_s, one_token_s, one_token_s], 90))


def test_policies_return_none_when_all_replicas_are_full() -> None:
    for make in (RayPowerOfTwo, RayPrefixAffinity, VllmRouterCacheAware):
        policy, fleet = make(), make_fleet("a", capacity=1)
        assert policy.choose(make_request(1), Fleet()) is None
        assert serve(fleet, policy, make_request(1)) == "a"
        assert serve(fleet, policy, make_request(1)) is None
    assert OracleRouting(lambda _name, _request: 0.0).choose(make_request(1), Fleet()) is None


def test_ray_power_of_two_takes_the_shorter_queue() -> None:
    fleet = make_fleet("a", "b")
    assert {serve(fleet, RayPowerOfTwo(), make_request(1)) for _ in range(2)} == {"a", "b"}


def test_ray_prefix_affinity_ignores_load_by_default() -> None:
    policy, fleet = RayPrefixAffinity(), make_fleet("a", "b", "c")
    first = serve(fleet, policy, make_request(1, 2))
    assert [serve(fleet, policy, make_request(1, 2, 3)) for _ in range(50)] == [first] * 50
    assert serve(fleet, policy, make_request(7)) != first
    bounded = RayPrefixAffinity(imbalanced_threshold=5)
    assert len({serve(fleet, bounded, make_request(1, 2, 3)) for _ in range(200)}) == 3


def test_vllm_router_leaves_the_matching_worker_when_load_is_imbalanced() -> None:
    policy, fleet = VllmRouterCacheAware(), make_fleet("a", "b")
    chosen = [serve(fleet, policy, make_request(1, 2)) for _ in range(80)]
    assert chosen[:65] == ["a"] * 65
    assert "b" in chosen[65:]


def test_the_oracle_weighs_cached_tokens_against_work() -> None:
    fleet = make_fleet("a", "b", "c")
    oracle = OracleRouting(lambda name, _request: {"b": 200.0}.get(name, 0.0))
    chosen = [serve(fleet, oracle, make_request(1, 2, 3)) for _ in range(20)]
    assert chosen[0] == "b"
    assert max(chosen, key=chosen.count) == "b"
    assert set(chosen) == {"a", "b", "c"}  # work in flight counts, too


def test_a_held_out_ratio_counts_only_peers_that_serve_the_trace() -> None:
    failed = counted_s({"ttft_p90_s": 0.1, "done": 98.0, "requests": 100.0})
    slow = counted_s({"ttft_p90_s": 2.0, "done": 99.0, "requests": 100.0})
    ours, peers = Summary((1.0, 1.0)), [Summary((failed, failed)), Summary((slow, failed))]
    assert vs_best(ours, peers).rounds == (0.5, pytest.approx(math.nan, nan_ok=True))


def test_the_decision_benchmark_reports_its_keys() -> None:
    parser = argparse.ArgumentParser()
    routing.add_arguments(parser)
    small = "--replicas 4 --blocks 4096 --decisions 20 --trace-s 20 --traces toolagent"
    args = parser.parse_args(small.split())
    args.rounds, args.quick = 1, True
    report = routing.run(args)
    assert report.keys["decision_us_p99"].median > 0
    assert "decision_us_p50_least-load" in report.keys
    assert "ttft_p90_vs_best_peer_held_out" in report.keys
