import argparse
from dataclasses import replace

import pytest

from benchmarks import routing
from benchmarks.routing import live
from benchmarks.routing.live_cluster import (
    OUR_POLICIES,
    PEERS_BY_SLUG,
    REPLICAS,
    generator,
    peer_policy,
    slug,
)
from benchmarks.routing.peers import RayPrefixAffinity
from benchmarks.routing.replay import make_prompt
from benchmarks.routing.traces import ratio
from cluster.config import parse
from cluster.gateway import Gateway, Wiring
from cluster.routing.prefix_policy import PrefixAffinity
from cluster.simulation.requests import Trace, TraceRequest


def trace_request(*blocks: int, prompt_tokens: int) -> TraceRequest:
    return TraceRequest(0.0, prompt_tokens, 1, blocks)


def test_equal_blocks_have_equal_text() -> None:
    requests = [
        trace_request(1, 2, prompt_tokens=20),
        trace_request(1, 3, prompt_tokens=17),
        trace_request(prompt_tokens=5),
    ]
    trace = Trace("t", requests, 8)
    first, second, third = (make_prompt(trace, number) for number in range(3))
    assert [len(text) for text in (first, second, third)] == [80, 68, 20]
    assert first[:32] == second[:32]
    assert first[32:36] != second[32:36]
    assert first[:20] != third
    assert make_prompt(replace(trace, name="u"), 0)[:32] != first[:32]


def test_hit_rate_and_highest_load_are_computed_from_the_log() -> None:
    def line(replica: str, seconds: float, cached: int) -> dict[str, object]:
        times = {"queue_s": 1.0, "total_s": 1.0 + seconds}
        return {"replica": replica, **times, "cached_tokens": cached, "prompt_tokens": 100}

    found = live.summarize_log([line("a", 3.0, 50), line("a", 3.0, 0), line("b", 2.0, 25)])
    assert found["hit_rate"] == pytest.approx(0.25)
    # Replicas without requests are part of the mean.
    assert found["max_over_mean_load"] == pytest.approx(6.0 / (8.0 / REPLICAS))


def test_each_live_policy_has_a_separate_pool() -> None:
    for name in live.LIVE_POLICIES:
        policy = name if name in OUR_POLICIES else "prefix"
        pool = slug(name)
        assert name in OUR_POLICIES or pool in PEERS_BY_SLUG
        (made,) = parse({"generators": [generator(pool, policy)]}).generators
        assert (made.name, made.routing) == (pool, policy)
    assert len({slug(name) for name in live.LIVE_POLICIES}) == len(live.LIVE_POLICIES)


async def test_the_name_of_a_pool_selects_the_peers_policy() -> None:
    peer = slug("ray prefix-aware")
    config = parse({"generators": [generator(peer)]})

    with peer_policy(peer):
        theirs = Gateway(config, {peer: Wiring(b"secret")})
    ours = Gateway(config, {peer: Wiring(b"secret")})
    assert isinstance(theirs.pools[peer].replicas.policy, RayPrefixAffinity)
    assert isinstance(ours.pools[peer].replicas.policy, PrefixAffinity)
    for gateway in (theirs, ours):
        await gateway.close()


def test_replayed_traces_have_no_completions_in_later_prompts() -> None:
    trace = live.make_trace("chat", 20.0, seed=0)
    assert trace.requests
    assert not any(request.answer_blocks for request in trace.requests)
    found = live.simulate_same("prefix", trace)
    assert 0.0 < found["hit_rate"] <= trace.max_hit_rate


def test_ratios_are_per_round_and_geometric_means_over_traces() -> None:
    parser = argparse.ArgumentParser()
    routing.add_arguments(parser)
    policies = ["--policies", "prefix", "round-robin"]
    args = parser.parse_args(["--live", "few-shot", "chat", *policies])
    args.rounds = 2

    def rounds(*ttfts_s: float) -> list[dict[str, float]]:
        return [dict.fromkeys((*live.COMPARED, "late_s"), ttft_s) for ttft_s in ttfts_s]

    found = {
        ("few-shot", "prefix", live.LIVE): rounds(2.0, 3.0),
        ("few-shot", "prefix", live.SIMULATED): rounds(1.0, 3.0),
        ("few-shot", "round-robin", live.LIVE): rounds(4.0, 3.0),
        ("few-shot", "round-robin", live.SIMULATED): rounds(4.0, 3.0),
        ("chat", "prefix", live.LIVE): rounds(8.0, 1.0),
        ("chat", "prefix", live.SIMULATED): rounds(1.0, 1.0),
        ("chat", "round-robin", live.LIVE): rounds(8.0, 4.0),
        ("chat", "round-robin", live.SIMULATED): rounds(8.0, 1.0),
    }
    keys = live.make_report(found, args).keys
    assert keys["live_over_simulated_ttft_p90"].rounds == pytest.approx((4.0, 1.0))
    assert keys["live_over_simulated_ttft_p90_round-robin"].rounds == pytest.approx((1.0, 2.0))
    assert keys["live_ttft_p90_prefix_vs_round_robin"].rounds == pytest.approx((0.5**0.5, 0.5))
    assert ratio(rounds(2.0), rounds(4.0), "hit_rate").rounds == (0.5,)
