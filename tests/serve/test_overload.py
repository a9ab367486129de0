"""The overload benchmark on gateway, links and a simulated engine, in virtual time."""

import pytest

from benchmarks.overload import inprocess
from benchmarks.overload.scenario import Scenario, numbers
from benchmarks.overload.virtual import virtual_time


@pytest.mark.parametrize("seed", [1, 3, 6])  # those that failed most clearly; all ten take longer
def test_overload_costs_neither_goodput_nor_anybodys_share(seed: int) -> None:
    scenario = Scenario(seconds=12.0)
    with virtual_time() as runner:
        measured = runner.run(scenario.run(inprocess.running(), seed))
    found = numbers(scenario, measured)
    assert found["goodput_ratio"] >= 0.95
    assert found["fair_share_error"] <= 0.10
    assert found["failed_requests"] == 0
