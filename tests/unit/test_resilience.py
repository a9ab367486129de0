"""Accounting of chaos and soak runs, in virtual time."""

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from resilience import chaos, soak
from resilience.accounting import (
    Answer,
    FaultResult,
    Target,
    Window,
    count_restarted,
    longest_waits,
    summarize,
    totals,
)
from resilience.faults import FAULTS, SHORT
from resilience.growth import Sample, measure_growth
from resilience.inside.link_proxy import RETRANSMISSION_S, LinkFault, LinkProxy
from resilience.load import LABELLED, Attempts, FailedRequestError, classify, text_of
from resilience.mixes import MIXES, SHARED_CORES, choose_mix
from resilience.samples import find_left, name_of
from resilience.testbed import Setup

WINDOW = Window(hit_s=100.0, healthy_s=110.0, ended_s=120.0)


def steady(client: str, begin_s: float, end_s: float, every_s: float = 0.5) -> Answer:
    """Return an answer with data at equal intervals."""
    num = round((end_s - begin_s) / every_s)
    return Answer(client, begin_s, end_s, tuple(begin_s + every_s * n for n in range(num + 1)))


def result_of(*answers: Answer, restarted: int = 0, healthy_s: float | None = 1.0) -> FaultResult:
    return summarize(answers, WINDOW, before_s=95.0, restarted=restarted, healthy_s=healthy_s)


# -- accounting -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data_s", "wait"),
    [
        ((99.0, 100.5, 105.0, 109.0), 4.5),
        ((99.0, 104.0, 107.0), 4.0),  # from the fault on
        ((90.0, 99.9, 104.0, 107.0), 4.0),  # waits before the fault do not count
        ((99.0,), 10.0),  # until the end of the window
        ((), 10.0),
    ],
)
def test_the_longest_wait_of_a_client(data_s: tuple[float, ...], wait: float) -> None:
    answer = Answer("greedy-1", 89.0, 130.0, data_s)
    (longest,) = longest_waits([answer], WINDOW.hit_s, WINDOW.healthy_s)
    assert (longest.client, longest.wait_s) == ("greedy-1", pytest.approx(wait))


def test_a_client_that_pauses_does_not_wait() -> None:
    answers = [steady("classify-0", 95, 101), steady("classify-0", 107, 111)]
    assert longest_waits(answers, 100, 110)[0].wait_s == pytest.approx(0.5)


def test_the_data_of_a_failed_answer_do_not_count() -> None:
    failed = replace(steady("greedy-1", 99, 105), error="error event")
    result = result_of(steady("greedy-2", 95, 112), failed)
    assert result.errors == {"greedy: error event": 1}
    assert (result.failed, result.recovery_s) == (1, pytest.approx(5.0))


def test_the_data_of_an_answer_that_fails_later_count() -> None:
    failed = replace(steady("greedy-1", 95, 115), error="error event")
    assert result_of(failed).recovery_s == pytest.approx(0.5)


def test_nothing_is_missed_without_an_effect() -> None:
    result = result_of(*(steady(f"greedy-{number}", 95, 112) for number in range(3)))
    assert (result.requests, result.failed, result.diverged) == (3, 0, 0)
    assert result.recovery_s == result.usual_gap_s == pytest.approx(0.5)
    assert result.missed(Target()) == []


def test_the_slow_reader_waits_by_itself() -> None:
    assert result_of(steady("slow-0", 95, 112, every_s=8)).recovery_s == 0.0


def test_answers_count_from_the_fault_to_the_next_one() -> None:
    ends = (99.0, 101.0, 119.0, 121.0)
    answers = [Answer("job", end_s - 1, end_s, (), "503") for end_s in ends]
    assert result_of(*answers).failed == 2


def test_broken_sockets_are_allowed_at_the_ingress_only() -> None:
    # The first one broke before this fault, and the last answer ended after the next.
    earlier_and_now = replace(steady("greedy-1", 95, 112), broken_s=(99.0, 101.0))
    later = replace(steady("greedy-2", 95, 130), broken_s=(102.0, 121.0))
    result = result_of(earlier_and_now, later)
    assert (result.failed, result.broken_at_ingress) == (0, 2)
    assert result.missed(Target(may_break_ingress=True)) == []
    assert result.missed(Target()) == ["broken_at_ingress 2 > 0"]


def test_a_target_may_allow_some_failed_requests() -> None:
    failed = [Answer("job", 100.5, 101.0, (), "503") for _ in range(2)]
    assert result_of(*failed).missed(Target(recovery_s=None, max_failed=2)) == []
    missed = result_of(*failed).missed(Target(recovery_s=None, max_failed=1))
    assert missed == ["failed 2 > 1"]


def test_missed_targets_are_named() -> None:
    diverged = replace(steady("greedy-1", 95, 112, every_s=3), diverged=True)
    assert result_of(diverged).missed(Target()) == ["diverged 1 > 0", "recovery_s 3.00 > 2"]
    assert result_of(healthy_s=None).missed(Target(recovery_s=None)) == ["not healthy again"]


def test_totals_take_recovery_from_faults_with_a_bound() -> None:
    results = [replace(result_of(restarted=1), recovery_s=s) for s in (1.0, 2.0, 1.5, 60.0)]
    targets = [*[Target()] * 3, Target(recovery_s=None)]
    keys = totals(results, targets)
    assert (keys["recovery_s_p50"], keys["recovery_s_max"], keys["restarted"]) == (1.5, 2.0, 4)


def test_a_replaced_replica_is_restarted_and_a_scaled_one_is_not() -> None:
    before = {"a": "router", "b": "generator", "c": "generator"}
    assert count_restarted(before, before) == 0
    assert count_restarted(before, {"a": "router", "d": "generator", "e": "generator"}) == 2
    assert count_restarted(before, {"a": "router", "b": "generator"}) == 0
    assert count_restarted(before, {**before, "f": "router"}) == 0


def test_faults_name_what_they_need() -> None:
    needed = "--engine vllm-tiny --tensor-parallel 2"
    assert FAULTS["kill-rank"].missing(Setup("vllm")) == needed
    assert not FAULTS["kill-rank"].missing(Setup("vllm-tiny", tensor_parallel=2))
    assert FAULTS["kill-engine-core"].missing(Setup("sim")) == "engine vllm/vllm-tiny"
    assert FAULTS["disk"].missing(Setup()) == "root"
    assert not any(FAULTS[name].missing(Setup("sim")) for name in SHORT)


@pytest.mark.parametrize(
    ("engine", "ranks", "num_cores", "mix"),
    [
        ("vllm-tiny", 2, 2, SHARED_CORES),
        ("vllm-tiny", 2, 3, SHARED_CORES),
        ("vllm-tiny", 2, 4, MIXES["vllm-tiny"]),
        ("vllm", 3, 4, SHARED_CORES),
        ("vllm", 1, 1, MIXES["vllm"]),  # one rank waits for no other
        ("sim", 1, 2, MIXES["sim"]),
    ],
)
def test_ranks_that_share_cores_get_a_smaller_load(
    engine: str, ranks: int, num_cores: int, mix: object
) -> None:
    assert choose_mix(engine, ranks, num_cores) is mix


def test_the_document_of_a_run_contains_its_load() -> None:
    args = chaos.make_parser().parse_args(["--engine", "vllm"])
    document = json.loads(json.dumps(chaos.make_document(args, chaos.Run(seed=0), [])))
    assert document["load"]["greedy"] == MIXES["vllm"].greedy


# -- answers ----------------------------------------------------------------------------------


def events(*texts: str, tokens: int = 2) -> str:
    common = {"id": "cmpl-1", "created": 5}
    lines = [json.dumps({**common, "choices": [{"index": 0, "text": text}]}) for text in texts]
    usage = json.dumps({**common, "choices": [], "usage": {"completion_tokens": tokens}})
    return "".join(f"data: {line}\n\n" for line in (*lines, usage, "[DONE]"))


def test_the_text_of_a_complete_stream() -> None:
    assert text_of(events(" a", " b"), 2) == " a b"


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (events(" a", " b").replace("data: [DONE]", ""), "incomplete"),
        (events(" a", tokens=1), "1 tokens instead of 2"),
        (events(" a").replace("cmpl-1", "cmpl-2", 1), "changed"),
        ('data: {"error": {"type": "x", "message": "y"}}\n\n', "error event x: y"),
        ("", "incomplete"),
    ],
)
def test_streams_that_are_not_complete_fail(raw: str, error: str) -> None:
    with pytest.raises(FailedRequestError, match=error):
        text_of(raw, 2)


async def test_an_unexpected_answer_raises_an_error() -> None:
    transport = httpx.MockTransport(lambda _request: httpx.Response(500, json={"error": {}}))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        with pytest.raises(FailedRequestError, match="500"):
            await classify(http, Attempts("key"))


async def test_attempts_of_a_classification_send_the_same_request() -> None:
    sent: dict[str, set[bytes]] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        key = request.headers["idempotency-key"]
        sent.setdefault(key, set()).add(request.content)
        label = LABELLED[json.loads(request.content)["input"]]
        return httpx.Response(200, json={"data": [{"label": label}]})

    keys = [f"key {number}" for number in range(20)]
    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for key in [*keys, *keys]:
            await classify(http, Attempts(key))
    assert all(len(bodies) == 1 for bodies in sent.values())
    assert len(set.union(*sent.values())) == len(LABELLED)


# -- growth -----------------------------------------------------------------------------------


def samples(per_minute_mb: float, noise_mb: float = 0.2, minutes: float = 3.0) -> list[Sample]:
    rng = random.Random(1)
    return [
        Sample(
            "router 1",
            at_s,
            100 + per_minute_mb * at_s / 60 + rng.gauss(0, noise_mb),
            (("tasks", 50 + rng.randrange(8)),),
        )
        for at_s in range(0, int(minutes * 60), 5)
    ]


@pytest.mark.parametrize(
    ("per_minute_mb", "grows"), [(0.0, False), (0.1, False), (0.6, True), (5.0, True)]
)
def test_growth_of_memory_is_told_from_noise(per_minute_mb: float, grows: bool) -> None:
    memory, tasks = measure_growth(samples(per_minute_mb), warm_up_s=60, life_s=90)
    assert memory.is_excessive == grows
    assert memory.per_minute == pytest.approx(per_minute_mb, abs=0.2)
    assert not tasks.is_excessive


def test_growth_of_a_count_beyond_its_share_is_excessive() -> None:
    leaking = [
        replace(one, counts=(("tasks", 50 + number),)) for number, one in enumerate(samples(0.0))
    ]
    assert measure_growth(leaking, 60, 90)[1].is_excessive


def test_short_lives_are_not_measured() -> None:
    assert measure_growth(samples(9.0, minutes=1.5), warm_up_s=60, life_s=90) == []


def test_the_report_of_a_soak_names_what_grew(tmp_path: Path) -> None:
    args = soak.make_parser().parse_args(["--minutes", "3"])
    gcs = [replace(one, process="gcs_server 2") for one in samples(5.0)]
    series = [replace(one, process=soak.METRICS, memory_mb=0.0) for one in samples(0.0)]
    failed = Answer("greedy-1", 0, 1, error="503")
    result = soak.SoakResult([*samples(5.0), *gcs, *series], [60.0], [failed])
    growths = measure_growth(result.samples, warm_up_s=60, life_s=90)
    rows = {row[0]: row for row in soak.make_report(growths, result).tables[0].rows}
    assert rows["router 1"][-1] == "grows"
    assert rows["gcs_server 2"][-2] == "–"  # not ours
    assert [one.process for one in soak.too_large(growths)] == ["router 1"]
    assert result.errors() == {"greedy: 503": 1}
    document = json.loads(json.dumps(soak.make_document(args, growths, result)))
    assert len(document["samples"]) == len(result.samples)
    soak.draw(result, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text("utf-8")


def test_what_a_load_leaves_is_named() -> None:
    before = {"router 1": {"tasks": 60, "descriptors": 100}, "engine 2": {"tasks": 40}}
    fine = {"tasks": 91, "descriptors": 141}
    assert find_left(before, {"router 1": fine, "engine 3": {"tasks": 999}}) == []
    left = find_left(before, {"router 1": {**fine, "tasks": 92}, "engine 2": {"tasks": 40}})
    assert left == ["router 1: tasks 60 → 92"]


def test_a_soak_that_measured_nothing_does_not_pass() -> None:
    roles = ("router 1", "engine 2", "classifier 3", soak.METRICS)
    measured = [replace(one, process=role) for role in roles for one in samples(0.0)]
    growths = measure_growth(measured, warm_up_s=60, life_s=90)
    killed = soak.SoakResult(measured, [60.0], [])
    assert soak.find_gaps(growths, killed, 180) == []
    unkilled = soak.SoakResult(measured, [], [])
    assert soak.find_gaps(growths, unkilled, 180) == ["no replica was killed"]
    assert soak.find_gaps(growths, unkilled, 90) == []
    no_router = [one for one in growths if one.process != "router 1"]
    assert "no growth of router" in soak.find_gaps(no_router, killed, 180)[0]
    with_proxy = replace(killed, samples=[*measured, replace(measured[0], process="haproxy 4")])
    assert "no growth of haproxy" in soak.find_gaps(growths, with_proxy, 180)[0]


def test_processes_have_the_role_or_the_name_of_their_program() -> None:
    class Process:
        def __init__(self, *command: str) -> None:
            self._command = command

        def cmdline(self) -> list[str]:
            return [*self._command]

        def name(self) -> str:
            return "x"

    def name(*command: str) -> str:
        return name_of(Process(*command))  # type: ignore[arg-type]

    assert name("ray::ServeReplica:tandem:generator-chat") == "engine"
    assert name("ray::ServeReplica:tandem:router") == "router"
    assert name("/usr/lib/ray/gcs_server", "--port=1") == "gcs_server"
    assert name() == "x"


# -- link proxy -------------------------------------------------------------------------------


async def test_the_proxy_holds_bytes_back_and_drops_none() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = LinkProxy(server.sockets[0].getsockname()[:2])
    reader, writer = await asyncio.open_connection(*await proxy.start())
    try:
        for fault in (LinkFault(holds_requests=True), LinkFault(holds_answers=True)):
            proxy.set_fault(fault)
            writer.write(b"a")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.1)
            proxy.set_fault(LinkFault())
            assert await asyncio.wait_for(reader.read(1), 60) == b"a"
        proxy.set_fault(LinkFault(loss=1.0))
        began_s = asyncio.get_running_loop().time()
        writer.write(b"b")
        assert await asyncio.wait_for(reader.read(1), 60) == b"b"
        assert asyncio.get_running_loop().time() - began_s >= 2 * RETRANSMISSION_S
    finally:
        writer.close()
        server.close()
        await proxy.close()
