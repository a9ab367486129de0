import random
from collections import defaultdict
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import RoutingPolicy
from cluster.errors import ConfigError
from cluster.load import Load
from cluster.routing import Fleet, Policy, PrefixIndex, Reach, RequestView, make_policy
from cluster.routing.session_policy import MAX_OVER_MEAN
from cluster.usage import Usage

POLICIES: tuple[RoutingPolicy, ...] = get_args(RoutingPolicy)
PROMPT = RequestView(1000.0, 100.0, streamed=True)
USAGE = Usage(1000, 0, 100)


def make_fleet(*names: str, capacity: int = 8) -> Fleet:
    fleet = Fleet()
    for name in names:
        fleet.add(name, capacity)
    fleet.advance(100.0)
    return fleet


def make_test_policy(name: RoutingPolicy, index: PrefixIndex | None = None) -> Policy:
    return make_policy(name, PrefixIndex() if index is None else index)


def prompt_with_prefix(*prefix: int, each: float = 1000.0, more: float = 100.0) -> RequestView:
    ends = tuple(each * (index + 1) for index in range(len(prefix)))
    return RequestView(each * len(prefix) + more, 100.0, prefix, ends, streamed=True)


def serve(fleet: Fleet, policy: Policy, request: RequestView = PROMPT) -> str:
    """Place a request on the replica that the policy chooses."""
    chosen = policy.choose(request, fleet)
    assert chosen is not None
    fleet.place(chosen, request)
    return chosen


@pytest.mark.parametrize("name", POLICIES)
def test_full_and_unreachable_replicas_are_not_chosen(name: RoutingPolicy) -> None:
    policy, fleet = make_test_policy(name), Fleet()
    asked = RequestView(10.0, session="s")
    assert policy.choose(asked, fleet) is None
    fleet.add("a", 1)
    assert policy.choose(asked, fleet) == "a"
    placement = fleet.place("a", asked)
    assert policy.choose(asked, fleet) is None
    fleet.add("b", 1, Reach.LAST_RESORT)
    assert policy.choose(asked, fleet) == "b"
    fleet.add("c", 1, Reach.NONE)
    fleet.set_reach("b", Reach.NONE)
    assert policy.choose(asked, fleet) is None
    fleet.end(placement)
    assert policy.choose(asked, fleet) == "a"
    fleet.set_capacity("a", 0)
    assert policy.choose(asked, fleet) is None
    fleet.remove("a")
    assert policy.choose(asked, fleet) is None


@pytest.mark.parametrize("name", POLICIES)
def test_a_last_resort_replica_is_chosen_only_if_the_others_are_full(name: RoutingPolicy) -> None:
    policy, fleet = make_test_policy(name), make_fleet("a", capacity=3)
    fleet.add("b", 3, Reach.LAST_RESORT)
    chosen = [serve(fleet, policy, RequestView(10.0, session="s")) for _ in range(6)]
    assert chosen == ["a"] * 3 + ["b"] * 3


@pytest.mark.parametrize("name", POLICIES)
def test_hidden_replicas_are_not_chosen(name: RoutingPolicy) -> None:
    policy, fleet = make_test_policy(name), make_fleet("a", "b", capacity=1000)
    fleet.add("c", 1000, Reach.LAST_RESORT)
    wanted = {"": {"a", "b"}, "a": {"b"}, "ab": {"c"}, "abc": {None}, "c": {"a", "b"}}
    for hidden, left in wanted.items():
        with fleet.hide(hidden):
            requests = [RequestView(10.0, session=str(number)) for number in range(50)]
            assert {policy.choose(request, fleet) for request in requests} == left
    assert list(fleet.open_rows()) == [True, True, *[False] * 6]


@pytest.mark.parametrize("name", POLICIES)
def test_equal_replicas_share_the_load(name: RoutingPolicy) -> None:
    policy, fleet = make_test_policy(name), make_fleet(*"abcd", capacity=1000)
    chosen = [serve(fleet, policy) for _ in range(400)]
    counts = [chosen.count(replica) for replica in "abcd"]
    # 100 each; ties within 2 % of the cost and random pairs may deviate by a few.
    assert max(counts) <= 110


def test_an_unknown_policy_is_rejected() -> None:
    with pytest.raises(ConfigError, match="round-robin"):
        make_policy("magic", PrefixIndex())


def test_load_is_measured_in_work_not_in_requests() -> None:
    policy, fleet = make_test_policy("least-load"), make_fleet("a", "b")
    fleet.place("a", RequestView(20_000.0))
    for _ in range(3):
        fleet.place("b", RequestView(100.0))
    assert policy.choose(PROMPT, fleet) == "b"


def test_decoding_counts_as_load() -> None:
    policy, fleet = make_test_policy("least-load"), make_fleet("a", "b")
    for name, expected in (("a", 4000.0), ("b", 10.0)):
        fleet.record_first_token(fleet.place(name, RequestView(100.0, expected)))
    assert policy.choose(PROMPT, fleet) == "b"


def test_a_cached_prefix_attracts_requests_until_its_replica_is_busy() -> None:
    index = PrefixIndex()
    policy, fleet = make_test_policy("prefix", index), make_fleet(*"abcdefgh", capacity=1000)
    index.add_stored("c", (1, 2, 3))
    asked = prompt_with_prefix(1, 2, 3, 4)
    assert policy.choose(asked, fleet) == "c"
    assert policy.choose(prompt_with_prefix(1, 2, 9), fleet) == "c"
    for _ in range(200):
        chosen = policy.choose(asked, fleet)
        assert chosen is not None
        held = index.count(chosen, asked.prefix)
        fleet.place(chosen, asked, asked.prefix_tokens[held - 1] if held else 0.0)
        index.expect(chosen, asked.prefix, index.count(chosen, asked.prefix))
    in_flight = [fleet.in_flight(name) for name in "abcdefgh"]
    assert min(in_flight) > 0
    # The first replica keeps a lead of about the work of one uncached prompt.
    assert max(in_flight) <= 1.4 * sum(in_flight) / len(in_flight)


def test_a_second_equal_prompt_follows_the_first_on_idle_replicas() -> None:
    index = PrefixIndex()
    policy, fleet = make_test_policy("prefix", index), make_fleet("a", "b", "c")
    asked = prompt_with_prefix(1, 2, 3, 4)
    first = serve(fleet, policy, asked)
    index.expect(first, asked.prefix)
    assert policy.choose(asked, fleet) == first


def test_false_cache_claims_lose_their_weight() -> None:
    index = PrefixIndex()
    policy, fleet = make_test_policy("prefix", index), make_fleet("liar", "honest")
    for start in range(0, 400, 4):
        prefix = tuple(range(start, start + 4))
        index.add_stored("liar", prefix)
        if start >= 200:
            index.add_stored("honest", prefix[:3])
    now, chosen = 100.0, []
    for start in range(0, 400, 4):
        asked = prompt_with_prefix(*range(start, start + 4))
        name = policy.choose(asked, fleet)
        assert name is not None
        chosen.append(name)
        cached = asked.prefix_tokens[index.count(name, asked.prefix) - 1]
        placement = fleet.place(name, asked, cached)
        fleet.advance(now := now + 1.0)
        fleet.record_first_token(placement)
        fleet.advance(now := now + 1.0)
        had = cached if name == "honest" else 0
        fleet.end(placement, Usage(4100, int(had), 100))
    assert chosen[0] == "liar"
    assert chosen[-50:].count("honest") > 30
    hit_s = fleet.table.hit_s
    assert hit_s[fleet.row_of("liar")] < 0.1 * hit_s[fleet.row_of("honest")]


def test_work_is_shared_although_one_replica_has_everything_cached() -> None:
    index = PrefixIndex()
    policy, fleet = make_test_policy("prefix", index), make_fleet(*"abcd")
    asked = prompt_with_prefix(1, 2, 3, 4)
    index.add_stored("a", asked.prefix)
    index.advance(100.0)
    counts = dict.fromkeys("abcd", 0)
    for step in range(2000):
        fleet.advance(100.0 + 0.05 * step)
        chosen = policy.choose(asked, fleet)
        assert chosen is not None
        held = index.count(chosen, asked.prefix)
        placement = fleet.place(chosen, asked, asked.prefix_tokens[held - 1] if held else 0.0)
        index.add_stored(chosen, asked.prefix)
        fleet.record_first_token(placement)
        fleet.end(placement)
        counts[chosen] += step >= 1000
    # 1,000 requests on 4 replicas; a replica may exceed its share by the cost of one prompt.
    assert max(counts.values()) <= 1.25 * 250


def test_a_loaded_adapter_attracts_requests_and_a_popular_one_spreads() -> None:
    policy, fleet = make_test_policy("prefix"), make_fleet(*"abcd", capacity=1000)
    asked = RequestView(500.0, 100.0, adapter="law")
    fleet.end(fleet.place("b", asked))
    assert policy.choose(asked, fleet) == "b"
    for _ in range(100):
        serve(fleet, policy, asked)
    assert all(fleet.in_flight(name) > 10 for name in "abcd")


def test_the_least_recently_used_adapter_is_evicted() -> None:
    fleet = Fleet(max_adapters=2)
    fleet.add("a", 10)
    fleet.add("b", 10)
    rows = [fleet.row_of(name) for name in "ab"]
    for adapter in ("law", "art", "law", "tax"):
        fleet.place("a", RequestView(1.0, adapter=adapter))
    loads = {each: list(fleet.adapters.num_loads(each)[rows]) for each in ("law", "art", "tax")}
    assert loads == {"law": [0.0, 1.0], "tax": [0.0, 1.0], "art": [2.0, 1.0]}
    fleet.remove("a")
    assert set(fleet.adapters.num_loads("law")) == {1.0}


def test_each_adapter_settles_on_its_own_replica() -> None:
    policy, fleet = make_test_policy("prefix"), Fleet(max_adapters=1)
    for name in "abcd":
        fleet.add(name, 1000)
    adapters, homes = ("law", "art", "tax", "sea"), defaultdict(set)
    drawn = random.Random(0)
    for _ in range(400):
        adapter = drawn.choice(adapters)
        chosen = policy.choose(RequestView(10.0, 1.0, adapter=adapter), fleet)
        assert chosen is not None
        fleet.end(fleet.place(chosen, RequestView(10.0, 1.0, adapter=adapter)))
        homes[adapter].add(chosen)
    assert sorted(len(each) for each in homes.values()) == [1, 1, 1, 1]
    assert set.union(*homes.values()) == set("abcd")


def test_a_session_moves_only_if_its_replica_is_removed() -> None:
    policy, fleet = make_test_policy("session"), make_fleet(*"abcdef")
    asked = [RequestView(10.0, session=f"user-{number}") for number in range(200)]
    before = [policy.choose(request, fleet) for request in asked]
    assert set(before) == set("abcdef")
    assert [policy.choose(request, fleet) for request in asked] == before
    other_router = make_test_policy("session")
    assert [other_router.choose(request, make_fleet(*"fedcba")) for request in asked] == before
    fleet.remove("c")
    after = [policy.choose(request, fleet) for request in asked]
    assert all(now == then for now, then in zip(after, before, strict=True) if then != "c")


def test_a_session_with_too_many_requests_spreads() -> None:
    policy, fleet = make_test_policy("session"), make_fleet(*"abcd", capacity=1000)
    for _ in range(100):
        serve(fleet, policy, RequestView(10.0, session="one"))
    bound = MAX_OVER_MEAN * 101 / 4 + 1  # the mean includes the next request; rounded up
    assert max(fleet.in_flight(name) for name in "abcd") <= bound


@given(
    in_flight=st.integers(-(10**12), 10**12),
    waiting=st.integers(-(10**12), 10**12),
    usage=st.floats(),
)
def test_any_load_report_allows_a_choice(in_flight: int, waiting: int, usage: float) -> None:
    for name in POLICIES:
        policy, fleet = make_test_policy(name), make_fleet("a", "b")
        fleet.place("a", PROMPT)
        fleet.update_load("a", Load(0, waiting, usage, in_flight))
        assert fleet.in_flight("a") >= 1
        assert policy.choose(PROMPT, fleet) in ("a", "b")


def test_a_load_report_cannot_lower_the_routers_own_count() -> None:
    policy, fleet = make_test_policy("least-load"), make_fleet("liar", "b", capacity=1000)
    for _ in range(100):
        serve(fleet, policy)
        fleet.update_load("liar", Load())
    assert fleet.in_flight("liar") == 50


def test_requests_of_other_routers_count_as_load() -> None:
    policy, fleet = make_test_policy("least-load"), make_fleet("a", "b")
    fleet.update_load("a", Load(2, 4, 0.5, in_flight=6))
    assert policy.choose(PROMPT, fleet) == "b"
    fleet.forget_load("a")
    fleet.update_load("b", Load(2, 4, in_flight=6))
    assert policy.choose(PROMPT, fleet) == "a"


@pytest.mark.parametrize("name", ["least-load", "prefix", "power-of-two"])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_slow_replica_gets_fewer_requests(name: RoutingPolicy, streamed: bool) -> None:
    """One replica of four is ten times slower, without reporting it."""
    shares = simulate(make_test_policy(name), streamed=streamed, slowness={"d": 10.0})
    assert shares["d"] < 0.5 * min(shares[other] for other in "abc")


def test_a_silent_replica_gets_few_requests() -> None:
    policy, fleet = make_test_policy("prefix"), make_fleet("hung", "b", "c", capacity=1000)
    hung = 0
    for step in range(300):
        fleet.advance(100.0 + step * 0.1)
        chosen = policy.choose(PROMPT, fleet)
        assert chosen is not None
        placement = fleet.place(chosen, PROMPT)
        if chosen == "hung":
            hung += 1
        else:
            fleet.record_first_token(placement)
            fleet.end(placement, USAGE)
    assert hung <= 10


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("jump_s", [-1e9, -50.0, 50.0, 1e9])
def test_clock_jumps_do_not_stop_routing(name: RoutingPolicy, jump_s: float) -> None:
    policy, fleet = make_test_policy(name), make_fleet("a", "b", capacity=1000)
    before = [fleet.place(serve(fleet, policy), PROMPT) for _ in range(10)]
    fleet.advance(100.0 + jump_s)
    for placement in before:
        fleet.record_first_token(placement)
        fleet.end(placement, USAGE)
    chosen = [serve(fleet, policy) for _ in range(20)]
    assert min(chosen.count("a"), chosen.count("b")) >= 4


@given(st.lists(st.tuples(st.sampled_from("afepr"), st.integers(0, 3)), max_size=80))
def test_no_load_is_left_after_all_requests_have_ended(steps: list[tuple[str, int]]) -> None:
    fleet, open_ones = make_fleet(*"0123", capacity=1000), []
    for count, (step, number) in enumerate(steps):
        name = str(number)
        fleet.advance(100.0 + count * 0.05)
        if step == "p" and name in fleet:
            asked = RequestView(100.0 * number, 10.1 * number, streamed=bool(number % 2))
            open_ones.append(fleet.place(name, asked))
        elif step == "f" and open_ones:
            fleet.record_first_token(open_ones[number % len(open_ones)])
        elif step == "e" and open_ones:
            fleet.end(open_ones[number % len(open_ones)], USAGE)
        elif step == "r" and name in fleet:
            fleet.remove(name)
        elif step == "a" and name not in fleet:
            fleet.add(name, 10)
    for placement in open_ones:
        fleet.end(placement)
    assert not fleet.table.in_flight.any()
    assert not fleet.table.num_decoding.any()
    assert not fleet.work_s().any()


def simulate(policy: Policy, *, streamed: bool, slowness: dict[str, float]) -> dict[str, int]:
    """Return the requests per replica of four, each of which computes one prompt at a time."""
    fleet = make_fleet(*"abcd", capacity=1000)
    shares, free_at = dict.fromkeys("abcd", 0), dict.fromkeys("abcd", 100.0)
    events: list[tuple[float, int, object]] = []
    asked = RequestView(1000.0, 50.0, streamed=streamed)
    for number in range(1200):
        now = 100.0 + number * 0.05
        for event in sorted((e for e in events if e[0] <= now), key=lambda e: e[:2]):
            events.remove(event)
            fleet.advance(event[0])
            event[2]()  # type: ignore[operator]
        fleet.advance(now)
        name = policy.choose(asked, fleet)
        assert name is not None
        placement = fleet.place(name, asked)
        shares[name] += 1
        slow = slowness.get(name, 1.0)
        free_at[name] = first = max(now, free_at[name]) + 0.1 * slow
        if streamed:
            events.append((first, number, lambda it=placement: fleet.record_first_token(it)))
        done = first + 0.5 * slow
        events.append((done, number, lambda it=placement: fleet.end(it, Usage(1000, 0, 50))))
    return shares
