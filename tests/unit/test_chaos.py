"""Accounting of failures, replaced replicas and outages around a fault, in virtual time."""

import random
from dataclasses import replace

import httpx
import pytest

from chaos.accounting import (
    Attempt,
    FaultResult,
    Goal,
    Window,
    count_restarted,
    longest_gap,
    measure,
    summarize,
)
from chaos.load import classify, describe

WINDOW = Window(began_s=95.0, killed_s=100.0, gone_s=100.2, ended_s=110.0)


def served(kind: str, *moments: float) -> Attempt:
    return Attempt(kind, moments[0] - 0.1, moments[-1], moments)


def steady(kind: str, start: float, end: float) -> list[Attempt]:
    """Return one successful request every 0.5 s."""
    return [served(kind, start + 0.5 * number) for number in range(int((end - start) * 2) + 1)]


def result_of(*attempts: Attempt, served_by_victim: frozenset[str] = frozenset()) -> FaultResult:
    return summarize(
        attempts,
        WINDOW,
        kinds=["stream", "job"],
        served_by_victim=served_by_victim,
        restarted=0,
        recovered_s=1.0,
    )


@pytest.mark.parametrize(
    ("moments", "gap"),
    [
        ([99.0, 100.5, 105.0, 109.0], 4.5),
        ([99.0, 104.0, 107.0], 4.0),  # from the kill
        ([90.0, 100.0, 104.0, 109.0], 5.0),  # gaps before the kill do not count
        ([99.0, 101.0], 9.0),  # not served again
        ([], 10.0),
        ([99.0, 111.0, 130.0], 10.0),  # answered only after the end
    ],
)
def test_the_longest_gap(moments: list[float], gap: float) -> None:
    assert longest_gap(moments, WINDOW.killed_s, WINDOW.ended_s) == pytest.approx(gap)


def test_no_fault_no_outage() -> None:
    result = result_of(*steady("stream", 95, 110), *steady("job", 95, 110))
    assert (result.failed, result.errors, result.lost) == (0, {}, {})
    assert result.requests == 40  # those that ended before the kill do not count
    assert result.outage_s == pytest.approx({"stream": 0.5, "job": 0.5})
    assert result.usual_gap_s == pytest.approx({"stream": 0.5, "job": 0.5})


def test_the_parts_of_a_failed_stream_are_no_service() -> None:
    failed = Attempt("stream", 99.0, 105.0, (101.0, 103.0, 105.0), "error event")
    result = result_of(*steady("stream", 95, 100), failed, *steady("stream", 106, 110))
    assert result.errors == {"stream: error event": 1}
    assert result.outage_s["stream"] == pytest.approx(6.0)


def test_data_before_the_kill_counts_even_if_the_stream_fails_after_it() -> None:
    cut = Attempt("stream", 95.0, 101.0, tuple(95.0 + 0.5 * i for i in range(12)), "error event")
    assert result_of(cut).usual_gap_s["stream"] == pytest.approx(0.5)


def test_a_long_stream_is_served_all_the_time() -> None:
    long = served("stream", *(95.0 + 0.1 * number for number in range(200)))
    assert result_of(long).outage_s["stream"] == pytest.approx(0.1)


def test_only_sockets_of_the_killed_process_are_no_failures() -> None:
    cut = Attempt("stream", 99.0, 100.1, (), "ReadError", "broken")
    dying = Attempt("stream", 100.1, 100.3, (), "ReadError", "broken")
    refused = Attempt("stream", 100.5, 100.6, (), "ConnectError", "refused")
    cut_later = Attempt("stream", 101.0, 102.0, (), "ReadError", "broken")
    other_kind = replace(cut, kind="job")
    result = result_of(
        cut, dying, refused, cut_later, other_kind, served_by_victim=frozenset({"stream"})
    )
    assert result.lost == {"stream: ReadError": 2, "stream: ConnectError": 1}
    assert result.errors == {"stream: ReadError": 1, "job: ReadError": 1}
    assert result.failed == 2


def test_failures_before_the_kill_do_not_count() -> None:
    assert result_of(Attempt("job", 98.0, 99.0, (), "503")).failed == 0


def test_a_replaced_replica_is_restarted_and_a_scaled_one_is_not() -> None:
    before = {"a": "router", "b": "generator", "c": "generator"}
    assert count_restarted(before, before) == 0
    assert count_restarted(before, {"a": "router", "d": "generator", "e": "generator"}) == 2
    assert count_restarted(before, {"a": "router", "b": "generator"}) == 0
    assert count_restarted(before, {**before, "f": "router"}) == 0


def test_missed_goals_are_named() -> None:
    result = result_of(*steady("stream", 95, 104), *steady("job", 95, 110))
    assert result.missed(Goal(failed=0, restarted=0)) == []
    assert result.missed(Goal(outage_s=2.0)) == ["outage_s 6 > 2"]
    assert replace(result, restarted=2).missed(Goal(restarted=0)) == ["restarted 2 > 0"]
    assert replace(result, recovered_s=None).missed(Goal()) == ["not recovered"]


def test_a_failure_while_reading_is_described() -> None:
    def parts() -> object:
        yield "one"
        raise ConnectionError("reset")

    attempt = measure("stream", parts(), lambda error: (str(error), "broken"))
    assert (len(attempt.served_s), attempt.error, attempt.connection) == (1, "reset", "broken")
    assert attempt.began_s <= attempt.served_s[0] <= attempt.ended_s


def test_an_unexpected_answer_fails_its_request_and_not_the_load() -> None:
    transport = httpx.MockTransport(lambda _request: httpx.Response(500, json={"error": {}}))
    with httpx.Client(transport=transport, base_url="http://test") as http:
        attempt = measure("classify", classify(http, random.Random(0)), describe)
    assert attempt.error == "KeyError: 'type'"


def test_greedy_streams_with_another_text_than_before_are_counted() -> None:
    def stream(ended_s: float, text: str, error: str = "") -> Attempt:
        return Attempt("stream", ended_s - 1, ended_s, (ended_s,), error, text=text)

    before = [stream(99.0, "Once upon a time there was"), stream(98.0, "Water boils at 100")]
    same = stream(105.0, "Once upon a time there was")
    other = stream(106.0, "Once upon a time, a fox")
    failed = stream(106.0, "Water boils", "error event")
    unknown = stream(107.0, "In the year 2000")  # not asked before the kill
    assert result_of(*before, same, failed, unknown).diverged == 0
    assert result_of(*before, same, other).diverged == 1
