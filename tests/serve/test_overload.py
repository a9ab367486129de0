"""The overload benchmark on gateway, links and a simulated engine, in virtual time."""

import pytest

from benchmarks.overload import GOALS, servers
from benchmarks.overload.scenario import Scenario, compute_keys
from benchmarks.overload.virtual_time import virtual_time


# These seeds failed most clearly during development; more seeds take too long.
@pytest.mark.parametrize("seed", [1, 3, 6])
def test_overload_reduces_neither_goodput_nor_fairness(seed: int) -> None:
    scenario = Scenario(seconds=12.0)
    with virtual_time() as runner:
        results = runner.run(scenario.run(servers.in_process(), seed))
    keys = compute_keys(scenario, results)
    assert keys["goodput_ratio"] >= float(GOALS["goodput_ratio"].removeprefix(">= "))
    assert keys["fair_share_error"] <= float(GOALS["fair_share_error"].removeprefix("<= "))
    assert keys["failed_requests"] == 0
