import pytest

from benchmarks.endpoint import TargetError
from benchmarks.processes import OTHER, cpu_used, role_of
from benchmarks.report import format_cell, format_number
from benchmarks.rounds import Summary
from benchmarks.wrk import WrkResult, parse_result

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


def test_the_result_line_is_parsed() -> None:
    assert parse_result(OUTPUT) == WrkResult(3771, 109723911, 6.001, 49.8, 90.1, 1, 2)


def test_output_without_a_result_is_an_error_that_shows_it() -> None:
    with pytest.raises(TargetError, match="unable to connect"):
        parse_result("unable to connect to 127.0.0.1:1 Connection refused\n")


def make_result(requests: int, num_bytes: int) -> WrkResult:
    return WrkResult(requests, num_bytes, 10.0, 0.0, 0.0, 0, 0)


def test_an_unfinished_response_counts_by_its_received_fraction() -> None:
    assert make_result(requests=4, num_bytes=6_500).count_responses(1_000, connections=8) == 6.5


def test_other_chunk_sizes_change_the_count_by_at_most_the_connections() -> None:
    # 400 responses in both cases, 5 % shorter or longer than the response to a single client.
    assert make_result(requests=400, num_bytes=380_000).count_responses(1_000, connections=8) == 400
    assert make_result(requests=400, num_bytes=420_000).count_responses(1_000, connections=8) == 408


@pytest.mark.parametrize(
    ("command", "role"),
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
        ("/ray/raylet --raylet_socket_name=/tmp/x", OTHER),
        ("ray::ServeController", OTHER),
    ],
)
def test_roles_are_found_in_command_lines(command: str, role: str) -> None:
    assert role_of(command) == role


def test_cpu_time_is_the_difference_between_snapshots() -> None:
    before = {(1, "router"): 5.0, (2, OTHER): 1.0, (3, OTHER): 7.0}
    after = {(1, "router"): 6.5, (2, OTHER): 1.25, (4, OTHER): 0.5}
    assert cpu_used(before, after) == {"router": 1.5, OTHER: 0.75}


def test_numbers_have_three_significant_digits() -> None:
    assert [format_number(value) for value in (0.0, 0.01234, 1.8, 56.78, 658.4, 12345.6)] == [
        "0", "0.0123", "1.8", "56.8", "658", "12,346",
    ]  # fmt: skip
    assert format_cell(Summary((1.0, 3.0, 2.0))) == "2 (1 – 3)"
    assert format_cell(Summary((2.0,))) == "2"
    assert format_cell(None) == "–"
