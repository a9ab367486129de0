import pytest

from benchmarks.cpu import REST, part_of, spent
from benchmarks.load import Load, parse
from benchmarks.report import number, show
from benchmarks.rounds import Summary
from cluster.errors import TandemError

OUTPUT = """\
Running 6s test @ http://127.0.0.1:8000
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    50.91ms   10.02ms 120.55ms   78.12%
Requests/sec:    628.44
Transfer/sec:     17.44MB
RESULT {"requests":3771,"num_bytes":109723911,"seconds":6.001,"p50_ms":49.8,"p99_ms":90.1,\
"not_ok":1,"broken":2}
"""


def test_the_result_is_found_in_what_wrk_prints() -> None:
    assert parse(OUTPUT) == Load(3771, 109723911, 6.001, 49.8, 90.1, 1, 2)


def test_no_result_is_an_error_with_wrks_own_words() -> None:
    with pytest.raises(TandemError, match="unable to connect"):
        parse("unable to connect to 127.0.0.1:1 Connection refused\n")


def made(requests: int, num_bytes: int) -> Load:
    return Load(requests, num_bytes, 10.0, 0.0, 0.0, 0, 0)


def test_an_unfinished_answer_counts_for_the_part_of_it_that_came() -> None:
    assert made(requests=4, num_bytes=6_500).answers(1_000, connections=8) == 6.5


def test_chunks_that_are_cut_otherwise_make_no_difference() -> None:
    # Fewer bytes an answer than a lone one has, and more: 400 answers either way.
    assert made(requests=400, num_bytes=380_000).answers(1_000, connections=8) == 400
    assert made(requests=400, num_bytes=420_000).answers(1_000, connections=8) == 408


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("/tmp/tandem-1/haproxy -db -f /tmp/tandem-1/haproxy.cfg", "haproxy"),
        ("ray::ServeReplica:tandem:router", "router"),
        ("ray::ServeReplica:tandem:generator-sim", "engine"),
        ("ray::ServeReplica:tandem:classifier-mood", "classifier"),
        ("ray::ServeReplica:peer:engine", "engine"),
        ("ray::ServeReplica:peer:ingress.handle_request_streaming", "ingress"),
        ("ray::ProxyActor", "proxy"),
        ("/venv/bin/python /venv/bin/vllm-router --host 127.0.0.1", "router"),
        ("python -m benchmarks.targets.bare 8000 0.0", "engine"),
        ("/ray/raylet --raylet_socket_name=/tmp/x", REST),
        ("ray::ServeController", REST),
    ],
)
def test_each_process_plays_its_part(command: str, part: str) -> None:
    assert part_of(command) == part


def test_cpu_time_is_that_between_the_snapshots() -> None:
    before = {(1, "router"): 5.0, (2, REST): 1.0, (3, REST): 7.0}
    after = {(1, "router"): 6.5, (2, REST): 1.25, (4, REST): 0.5}
    assert spent(before, after) == {"router": 1.5, REST: 0.75}


def test_numbers_are_short_and_exact_enough() -> None:
    assert [number(value) for value in (0.0, 0.01234, 1.8, 56.78, 658.4, 12345.6)] == [
        "0", "0.0123", "1.8", "56.8", "658", "12,346",
    ]  # fmt: skip
    assert show(Summary((1.0, 3.0, 2.0))) == "2 (1 – 3)"
    assert show(Summary((2.0,))) == "2"
    assert show(None) == "–"
