import pytest

from benchmarks.endpoint import TargetError
from benchmarks.stream import capacity, idle
from benchmarks.stream.capacity import FEW, MOST, STEP, find_max_streams
from benchmarks.stream.targets import CLUSTER, VLLM_ROUTER


class Server:
    """A server that is slow, or fails, above a number of streams."""

    def __init__(self, most: int, error: Exception | None = None) -> None:
        self.most = most
        self.error = error
        self.measured: list[int] = []

    def itl_p99_s(self, num_streams: int) -> float:
        self.measured.append(num_streams)
        if num_streams <= self.most:
            return 0.021
        if self.error is not None:
            raise self.error
        return 0.030


@pytest.mark.parametrize("error", [None, TargetError("429"), ConnectionResetError()])
@pytest.mark.parametrize("most", [FEW, 20, 60, 64, 700, 4000])
def test_the_limit_is_found_to_within_a_step(most: int, error: Exception | None) -> None:
    server = Server(most, error)
    found = find_max_streams(server.itl_p99_s)
    assert found is not None
    assert found <= most < max(found * STEP, found + 1)
    assert max(server.measured) <= 2 * most
    assert len(server.measured) <= 12


def test_more_streams_than_the_most_are_not_tried() -> None:
    server = Server(10 * MOST)
    assert find_max_streams(server.itl_p99_s) == MOST
    assert max(server.measured) == MOST


def test_a_server_that_fails_with_a_few_streams_has_no_limit() -> None:
    assert find_max_streams(Server(FEW - 1, TargetError("500")).itl_p99_s) is None


def test_failed_measurements_are_left_out_of_the_report() -> None:
    report = capacity.make_report({CLUSTER: [300.0, 400.0], VLLM_ROUTER: [200.0, 200.0]}, {})
    assert report.keys["streams_per_core_vs_vllm_router"].rounds == (1.5, 2.0)
    report = idle.make_report({CLUSTER: [50.0, 60.0], VLLM_ROUTER: [None, 30.0]}, {})
    assert report.keys["idle_pss_ratio_vs_vllm_router"].rounds == (2.0,)
    assert report.values["idle_pss_mb"]["tuned"].rounds == (30.0,)
    failed = idle.make_report({VLLM_ROUTER: [None]}, {})
    assert (failed.keys, failed.goals, failed.values["idle_pss_mb"]) == ({}, {}, {})
    assert list(failed.tables[0].rows) == [(VLLM_ROUTER, None)]
