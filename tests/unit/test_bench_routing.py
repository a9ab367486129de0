import argparse

from benchmarks import routing
from benchmarks.routing.peers import (
    Oracle,
    RayPowerOfTwo,
    RayPrefixAffinity,
    VllmRouterCacheAware,
)
from benchmarks.routing.traces import alone_ttft_p90_s
from cluster.routing import Fleet, Policy, RequestView
from cluster.simulation.requests import Trace, TraceRequest

ENDS = (100.0, 200.0, 300.0)


def a_fleet(*names: str, capacity: int = 100) -> Fleet:
    fleet = Fleet()
    for name in names:
        fleet.add(name, capacity)
    return fleet


def asked(*prefix: int) -> RequestView:
    return RequestView(ENDS[len(prefix) - 1], 10.0, prefix, ENDS[: len(prefix)])


def serve(fleet: Fleet, policy: Policy, request: RequestView) -> str | None:
    chosen = policy.choose(request, fleet)
    if chosen is not None:
        fleet.place(chosen, request)
    return chosen


def test_a_request_alone_computes_what_was_never_seen() -> None:
    def asks(at_s: float, blocks: tuple[int, ...], answer: tuple[int, ...] = ()) -> TraceRequest:
        return TraceRequest(at_s, 100 * len(blocks), 10, blocks, answer)

    requests = [asks(0.0, (1, 2), (3,)), asks(1.0, (1, 2, 3)), asks(2.0, (1, 2, 3))]
    assert alone_ttft_p90_s(Trace("t", requests[:1], 100)) == 200 * 1e-4
    found = alone_ttft_p90_s(Trace("t", requests, 100))
    assert 1e-4 < found < 200 * 1e-4


def test_every_peer_says_when_there_is_no_room() -> None:
    for make in (RayPowerOfTwo, RayPrefixAffinity, VllmRouterCacheAware):
        policy, fleet = make(), a_fleet("a", capacity=1)
        assert policy.choose(asked(1), Fleet()) is None
        assert serve(fleet, policy, asked(1)) == "a"
        assert serve(fleet, policy, asked(1)) is None
    assert Oracle(lambda _name, _request: 0.0).choose(asked(1), Fleet()) is None


def test_ray_takes_the_shorter_queue_of_two() -> None:
    fleet = a_fleet("a", "b")
    assert {serve(fleet, RayPowerOfTwo(), asked(1)) for _ in range(2)} == {"a", "b"}


def test_rays_affinity_follows_a_prompt_whatever_the_load() -> None:
    policy, fleet = RayPrefixAffinity(), a_fleet("a", "b", "c")
    first = serve(fleet, policy, asked(1, 2))
    assert [serve(fleet, policy, asked(1, 2, 3)) for _ in range(50)] == [first] * 50
    assert serve(fleet, policy, asked(7)) != first
    bounded = RayPrefixAffinity(imbalanced_threshold=5)
    assert len({serve(fleet, bounded, asked(1, 2, 3)) for _ in range(200)}) == 3


def test_vllm_router_leaves_a_prompts_worker_once_load_is_imbalanced() -> None:
    policy, fleet = VllmRouterCacheAware(), a_fleet("a", "b")
    chosen = [serve(fleet, policy, asked(1, 2)) for _ in range(80)]
    assert chosen[:65] == ["a"] * 65
    assert "b" in chosen[65:]


def test_the_oracle_takes_what_is_cached() -> None:
    fleet = a_fleet("a", "b", "c")
    oracle = Oracle(lambda name, _request: {"b": 200.0}.get(name, 0.0))
    assert [serve(fleet, oracle, asked(1, 2, 3)) for _ in range(20)] == ["b"] * 20


def test_the_benchmark_of_decisions_reports_its_keys() -> None:
    parser = argparse.ArgumentParser()
    routing.add_arguments(parser)
    args = parser.parse_args(["--replicas", "4", "--blocks", "4096", "--decisions", "20"])
    args.rounds, args.quick = 1, True
    report = routing.run(args)
    assert report.keys["decision_us_p99"].median > 0
    assert "decision_us_p50_least-load" in report.keys
