import pytest

from benchmarks.memory.loads import LOADS
from benchmarks.processes import ProcessMemory, parse_sizes
from cluster.config import GeneratorConfig

ROLLUP = """\
55d0c8a00000-7ffd3b9e2000 ---p 00000000 00:00 0                          [rollup]
Rss:              250000 kB
Pss:              125000 kB
Pss_Anon:          90000 kB
Shared_Clean:     100000 kB
"""
STATUS = "Name:\tray::Router\nVmHWM:\t  260000 kB\nThreads:\t34\nVmRSS:\t  250000 kB\n"


def test_memory_is_parsed_from_smaps_rollup() -> None:
    assert ProcessMemory.parse(ROLLUP) == ProcessMemory(rss_mb=256.0, pss_mb=128.0)


def test_lines_without_a_size_are_ignored() -> None:
    assert parse_sizes(STATUS) == {"VmHWM": 260000, "VmRSS": 250000}


@pytest.mark.parametrize("name", LOADS)
def test_the_engine_runs_all_streams_at_the_same_time(name: str) -> None:
    config = GeneratorConfig.model_validate(LOADS[name].generator)
    streams = int(name.partition("_")[0])
    assert config.max_in_flight >= streams
    assert config.sim.max_num_seqs >= streams
