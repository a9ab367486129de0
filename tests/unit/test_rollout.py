"""Decisions of rollouts, the comparison of versions, and the division of sessions."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as replace_fields

from cluster.config import RolloutConfig, parse
from cluster.errors import ConfigError
from cluster.metrics import table
from cluster.rollout import (
    UNLABELED,
    Figures,
    Observation,
    RolloutState,
    Totals,
    decide,
    judge,
    plan,
    takes_candidate,
)

RULE = RolloutConfig(model="new", version="2", step_s=10, min_requests=100)
STATE = RolloutState(version="2", model="new", replicas=4, room=4, since=0.0)


def histogram(metric: table.Metric, seconds: float, count: int) -> tuple[int, ...]:
    counts = [0] * (len(metric.buckets) + 1)
    counts[next(i for i, bound in enumerate(metric.buckets) if bound >= seconds)] = count
    return tuple(counts)


def figures(
    finished: int, failed: int = 0, ttft_s: float = 0.3, mean_tokens: float = 50, **more: Any
) -> Figures:
    """Return answers with equal TTFT; lengths vary by a fifth."""
    ended = finished - failed
    return Figures(
        finished=finished,
        failed=failed,
        lengths=ended,
        tokens=ended * mean_tokens,
        squared_tokens=ended * mean_tokens**2 * 1.04,
        ttft=histogram(table.TTFT_SECONDS, ttft_s, ended),
        itl=histogram(table.ITL_SECONDS, 0.03, ended * 10),
        latency=histogram(table.REQUEST_SECONDS, ttft_s, finished),
        **more,
    )


def follow(seen: list[Observation], state: RolloutState = STATE) -> list[RolloutState]:
    states = []
    for observation in seen:
        state = decide(state, "generator", RULE, observation)
        states.append(state)
    return states


def steady(num: int, each: Totals, every_s: float = 15) -> list[Observation]:
    """Return observations of a cluster in which ``each`` is added every time."""
    totals, seen = Totals(), []
    for index in range(num):
        seen.append(Observation(index * every_s, totals, ready=4))
        totals = totals + each
    return seen


# -- the whole rollout -----------------------------------------------------------------------------


def test_an_equal_version_is_promoted_step_by_step() -> None:
    states = follow(steady(12, Totals(figures(400), figures(150))))
    shares = [state.share for state in states]
    assert sorted(set(shares)) == [0.0, 5.0, 25.0, 100.0]
    assert states[-1].phase == "promoted"
    assert [d.decision for d in states[-1].decisions] == [
        *("share", "step", "share", "step", "share", "promoted"),
    ]


def test_a_failing_version_is_rolled_back_long_before_it_has_enough_answers() -> None:
    states = follow(steady(12, Totals(figures(400), figures(8, failed=8))))
    assert states[-1].phase == "rolled_back"
    assert states[-1].share == 0
    assert states[-1].window.new.finished < RULE.min_requests
    assert "8 of 8 failed, before 0 of 400" in states[-1].decisions[-1].reason


def test_shadow_precedes_the_canary() -> None:
    rule = RULE.model_copy(update={"shadow": True})
    state, seen = STATE, steady(5, Totals(figures(400), figures(150)))
    phases = []
    for observation in seen:
        state = decide(state, "generator", rule, observation)
        phases.append((state.phase, state.is_shadowed, state.share))
    assert phases[1:3] == [("shadow", True, 0.0), ("canary", False, 0.0)]
    assert phases[3][2] == 5.0


def test_replicas_are_there_before_their_share() -> None:
    state = decide(STATE, "generator", RULE, Observation(0.0))
    assert (state.new_replicas, state.share) == (1, 0.0)
    state = decide(state, "generator", RULE, Observation(2.0, ready=1))
    assert state.share == 5.0
    totals = Totals(figures(400), figures(150))
    state = decide(state, "generator", RULE, Observation(20.0, totals, ready=1))
    assert state.share == 5.0  # 25 % of four replicas need one
    state = decide(state, "generator", RULE, Observation(22.0, totals, ready=1))
    state = decide(state, "generator", RULE, Observation(40.0, totals + totals, ready=1))
    assert (state.step, state.share, state.new_replicas) == (2, 25.0, 4)
    waiting = decide(state, "generator", RULE, Observation(60.0, totals + totals, ready=3))
    assert waiting.share == 25.0
    assert decide(waiting, "generator", RULE, Observation(61.0, ready=4)).share == 100.0


def test_a_version_that_does_not_start_is_rolled_back() -> None:
    started = decide(STATE, "generator", RULE, Observation(0.0))
    late = decide(started, "generator", RULE, Observation(RULE.start_timeout_s + 1))
    assert late.phase == "rolled_back"
    failed = decide(started, "generator", RULE, Observation(1.0, failure="no such file"))
    assert (failed.phase, failed.decisions[-1].reason) == ("rolled_back", "no such file")


def test_a_step_without_enough_answers_pauses_and_can_be_resumed() -> None:
    state = follow(steady(3, Totals(figures(10), figures(3))))[-1]
    late = decide(state, "generator", RULE, Observation(5000.0, ready=1))
    assert late.is_paused
    assert late.share == 5.0
    assert "answers" in late.decisions[-1].reason
    good = Totals(figures(400), figures(150))
    assert decide(late, "generator", RULE, Observation(5100.0, good, ready=4)).share == 5.0
    again = decide(late, "generator", RULE, Observation(5100.0, ready=4, action="resume"))
    assert not again.is_paused
    assert decide(again, "generator", RULE, Observation(5120.0, good, ready=4)).step == 1


def test_labels_of_earlier_steps_count_in_the_last_one() -> None:
    rule = RULE.model_copy(update={"canary": (50.0, 100.0)})
    state, phases = STATE, []
    totals = Totals()
    for index in range(9):
        state = decide(state, "classifier", rule, Observation(index * 15.0, totals, ready=4))
        phases.append(state.phase)
        compared = 25 if state.share == 50 else 3 if state.share == 100 and index < 5 else 0
        totals += Totals(figures(400), figures(150, compared=compared, agreed=compared))
    assert phases[-1] == "promoted"


def test_an_operator_can_pause_and_abort() -> None:
    state = follow(steady(3, Totals(figures(10), figures(3))))[-1]
    paused = decide(state, "generator", RULE, Observation(50.0, action="pause"))
    assert paused.is_paused
    aborted = decide(paused, "generator", RULE, Observation(60.0, action="abort"))
    assert (aborted.phase, aborted.share, aborted.new_replicas) == ("rolled_back", 0.0, 0)


observations = st.lists(
    st.builds(
        Observation,
        now=st.floats(0, 100),
        totals=st.builds(
            Totals,
            st.builds(figures, st.integers(50, 500), st.integers(0, 50)),
            st.builds(figures, st.integers(50, 500), st.integers(0, 50)),
        ),
        ready=st.integers(0, 4),
        action=st.sampled_from([None, None, None, "pause", "resume", "abort"]),
    ),
    max_size=30,
).map(
    lambda seen: [
        replace(one, now=sum(o.now for o in seen[: i + 1]), totals=_sum(seen[: i + 1]))
        for i, one in enumerate(seen)
    ]
)


def _sum(seen: list[Observation]) -> Totals:
    return sum((one.totals for one in seen), Totals())


@settings(max_examples=200, deadline=None)
@given(observations)
def test_the_share_never_oscillates(seen: list[Observation]) -> None:
    states = follow(seen)
    for before, after in pairwise(states):
        assert after.share >= before.share or after.phase == "rolled_back"
        if before.is_finished:
            assert after == before


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 300)), max_size=40))
def test_too_few_answers_never_advance(answers: list[tuple[int, float]]) -> None:
    totals, now, seen = Totals(), 0.0, []
    for num, duration_s in answers:
        totals = totals + Totals(figures(500), figures(num))
        now += duration_s
        seen.append(Observation(now, totals, ready=4))
    for state in follow(seen):
        if state.window.new.finished < RULE.min_requests:
            assert state.phase != "promoted"
        assert state.step <= totals.new.finished // RULE.min_requests


# -- comparison ------------------------------------------------------------------------------------


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.integers(0, 2))
def test_few_failures_and_slow_answers_never_roll_back(
    num_old: int, num_new: int, failed: int
) -> None:
    slow = figures(1, ttft_s=60.0, mean_tokens=1000)
    new = figures(num_new, failed=min(failed, num_new)) + slow
    assert judge("generator", RULE, figures(num_old), new).outcome != "worse"


@given(st.integers(500, 5000), st.floats(0, 0.5), st.floats(0.2, 0.5))
def test_a_raised_error_rate_is_worse(num: int, before: float, added: float) -> None:
    old, new = figures(num, int(num * before)), figures(num, round(num * (before + added)))
    assert judge("generator", RULE, old, new).outcome == "worse"
    assert judge("generator", RULE, new, old).outcome != "worse"


@pytest.mark.parametrize(
    ("new", "outcome"),
    [
        (figures(400), "fine"),
        (figures(99), "unknown"),
        (figures(400, failed=2), "fine"),
        (figures(400, failed=12), "unknown"),  # 3 %: perhaps above the limit
        (figures(400, failed=40), "worse"),
        (figures(400, ttft_s=4.0), "worse"),
        (figures(19, ttft_s=4.0), "unknown"),
        (figures(20, ttft_s=4.0), "worse"),
        (figures(400, mean_tokens=120), "worse"),
        (figures(400, mean_tokens=10), "worse"),
        (figures(400, mean_tokens=70), "fine"),
    ],
)
def test_generators(new: Figures, outcome: str) -> None:
    assert judge("generator", RULE, figures(1000), new).outcome == outcome


@pytest.mark.parametrize(
    ("agreed", "compared", "outcome"),
    [
        (0, 0, "uncompared"),
        (4, 10, "uncompared"),
        (19, 20, "fine"),
        (85, 100, "unknown"),
        (50, 100, "worse"),
    ],
)
def test_agreement_of_classifiers(agreed: int, compared: int, outcome: str) -> None:
    new = figures(400, compared=compared, agreed=agreed)
    assert judge("classifier", RULE, figures(1000), new).outcome == outcome


@pytest.mark.parametrize(
    ("old", "kind", "outcome"),
    [
        (Figures(), "generator", "uncompared"),
        (figures(19), "generator", "uncompared"),
        (replace_fields(figures(400), lengths=0, tokens=0.0), "generator", "uncompared"),
        (replace_fields(figures(400), ttft=()), "generator", "uncompared"),
        (figures(400), UNLABELED, "fine"),
    ],
)
def test_missing_figures_are_not_within_their_limits(old: Figures, kind: str, outcome: str) -> None:
    assert judge(kind, RULE, old, figures(400)).outcome == outcome
    assert judge(kind, RULE, old, figures(400, failed=200)).outcome == "worse"


def test_figures_of_a_period_are_a_difference() -> None:
    first, second = figures(100, failed=3), figures(50, failed=1)
    assert (first + second) - first == second
    assert Figures() + first == first


# -- replicas and sessions -------------------------------------------------------------------------


@given(st.integers(0, 20), st.integers(0, 20), st.floats(0.1, 100))
def test_a_plan_fits_the_hardware(replicas: int, room: int, share: float) -> None:
    new, old = plan(replicas, room, share)
    most_old = max(1, replicas) if old is None else old
    assert new >= 1
    assert new + most_old <= max(1, replicas) + room
    assert most_old >= 1 or (replicas <= 1 and room == 0)


def test_the_only_replica_gives_way_if_there_is_no_room() -> None:
    state = replace_room(replicas=1, room=0)
    state = decide(state, "generator", RULE, Observation(0.0))
    assert (state.new_replicas, state.old_replicas, state.share) == (1, 0, 100.0)
    state = decide(state, "generator", RULE, Observation(30.0, ready=1))
    assert (state.phase, state.share) == ("canary", 100.0)
    failed = decide(state, "generator", RULE, Observation(40.0, Totals(new=figures(9, 9)), ready=1))
    assert (failed.phase, failed.share, failed.old_replicas) == ("rolled_back", 0.0, None)
    # Nothing is promoted that was not compared, unless an operator accepts that.
    good = Observation(60.0, Totals(new=figures(150)), ready=1)
    paused = decide(state, "generator", RULE, good)
    assert (paused.phase, paused.share, paused.is_paused) == ("canary", 100.0, True)
    assert "only 0 answers of the old version" in paused.decisions[-1].reason
    resumed = decide(paused, "generator", RULE, replace(good, now=70.0, action="resume"))
    assert decide(resumed, "generator", RULE, replace(good, now=72.0)).phase == "promoted"
    bad = Observation(72.0, Totals(new=figures(300, 150)), ready=1)
    assert decide(resumed, "generator", RULE, bad).phase == "rolled_back"


def test_a_shadow_that_has_no_room_ends_the_rollout() -> None:
    rule = RULE.model_copy(update={"shadow": True})
    state = decide(replace_room(replicas=1, room=0), "generator", rule, Observation(0.0))
    assert (state.phase, state.share, state.old_replicas) == ("rolled_back", 0.0, None)
    assert "no room for the shadow" in state.decisions[-1].reason


def replace_room(**fields: int) -> RolloutState:
    return RolloutState(**{"version": "2", "model": "new", "since": 0.0, **fields})  # type: ignore[arg-type]


@given(st.text(max_size=20), st.floats(0, 100), st.floats(0, 100))
def test_a_session_keeps_its_version_while_the_share_grows(
    key: str, first: float, second: float
) -> None:
    low, high = sorted((first, second))
    if takes_candidate("2", key, low):
        assert takes_candidate("2", key, high)
    assert takes_candidate("2", key, 100.0)
    assert not takes_candidate("2", key, 0.0)


def test_the_share_is_that_of_the_sessions() -> None:
    taken = sum(takes_candidate("2", f"session {i}", 25.0) for i in range(10_000))
    assert 2_300 < taken < 2_700  # more than four standard deviations


# -- configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"model": "n", "version": "2", "canary": [5, 5, 100]}, "ascend and end with 100"),
        ({"model": "n", "version": "2", "canary": [5, 50]}, "ascend and end with 100"),
        ({"model": "n", "version": "A_B"}, "version"),
        ({"model": "n", "version": "1"}, "the pool's present version"),
        ({"version": "2"}, "missing"),
    ],
)
def test_invalid_rollouts(rollout: dict[str, Any], message: str) -> None:
    pool = {"name": "g", "model": "m", "version": "1", "rollout": rollout}
    with pytest.raises(ConfigError, match=message):
        parse({"generators": [pool]})


def test_a_promoted_pool_is_the_candidate() -> None:
    """Its deployment keeps its name and its version, so Serve keeps its replicas."""
    rollout = {"model": "n", "version": "2"}
    before = parse({"generators": [{"name": "g", "model": "m", "rollout": rollout}]})
    after = parse({"generators": [{"name": "g", "model": "n", "version": "2"}]})
    assert before.generators[0].candidate == after.generators[0]
    assert [name for name, _ in before.served_pools] == ["g", "g@2"]
