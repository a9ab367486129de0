"""Engine cores of one replica: each one that hangs is noticed, and their load is summed."""

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.engines.vllm.cores import EngineCores
from cluster.errors import EngineDeadError
from cluster.load import Load


def stats(running: int, waiting: int, usage: float) -> Any:
    return SimpleNamespace(num_running_reqs=running, num_waiting_reqs=waiting, kv_cache_usage=usage)


class Watched:
    """Two cores with a timeout of 30 s, checked every second."""

    def __init__(self) -> None:
        self.now = 0.0
        self.cores = EngineCores(30.0, lambda: self.now)
        for index in range(2):
            self.cores.add(index)

    def check_for(self, duration_s: int, *, stepping: int, unfinished: tuple[int, int]) -> None:
        for _ in range(duration_s):
            self.now += 1.0
            self.cores.count_step(stepping, stats(1, 0, 0.5))
            self.cores.check(unfinished)


def test_a_core_that_hangs_is_noticed_while_another_works() -> None:
    watched = Watched()
    watched.check_for(30, stepping=0, unfinished=(1, 1))
    with pytest.raises(EngineDeadError, match="no progress for 30 s"):
        watched.check_for(2, stepping=0, unfinished=(1, 1))


def test_an_idle_core_need_not_step() -> None:
    Watched().check_for(100, stepping=1, unfinished=(0, 5))


def test_the_load_is_that_of_all_cores() -> None:
    cores = Watched().cores
    assert cores.load(3) == Load(running=3)
    cores.count_step(0, stats(5, 2, 0.6))
    cores.count_step(1, None)
    assert cores.load(7) == Load(5, 2, 0.3)
    cores.count_step(1, stats(1, 1, 0.2))
    assert cores.load(9) == Load(6, 3, 0.4)
    assert cores.load(0) == Load()


@pytest.mark.parametrize(
    ("last", "unfinished", "load"),
    [
        (stats(8, 24, 0.9), 1, Load(1, 0, 0.9)),  # before an abort of all requests
        (stats(0, 0, 0.0), 3, Load(3, 0, 0.0)),  # before the first step of new ones
        (stats(1, 1, 0.1), 1, Load(1, 0, 0.1)),  # with a request that nobody waits for
        (stats(0, 2, 0.1), 2, Load(0, 2, 0.1)),  # such as for the compilation of a grammar
    ],
)
def test_requests_that_run_do_not_count_as_waiting(last: Any, unfinished: int, load: Load) -> None:
    cores = EngineCores(30.0)
    cores.add(0)
    cores.count_step(0, last)
    assert cores.load(unfinished) == load
