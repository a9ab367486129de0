"""Report of ``bench start``, and the names of processes in it."""

import pytest

from benchmarks.start import ProcessUse, WarmStart, make_report, name_of

IDLE = {"ray::A": ProcessUse(0.02, 400.0), "raylet": ProcessUse(0.03, 100.0)}


def test_keys_are_sums_over_processes() -> None:
    report = make_report([100.0, 110.0], [WarmStart(15.0, 18.0, IDLE), WarmStart(16.0, 19.0, IDLE)])
    assert {name: key.median for name, key in report.keys.items()} == pytest.approx(
        {
            "clone_to_first_answer_s": 105.0,
            "warm_start_s": 18.5,
            "idle_cpu_cores": 0.05,
            "idle_memory_gb": 0.5,
        }
    )
    assert report.goals.keys() == report.keys.keys()


def test_without_a_clone_its_key_is_missing() -> None:
    report = make_report([], [WarmStart(15.0, 18.0, IDLE)])
    assert "clone_to_first_answer_s" not in report.keys
    assert "clone_to_first_answer_s" not in report.goals


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("ray::ServeReplica:tandem:router", "ray::ServeReplica:tandem:router"),
        ("/x/raylet --session=1", "raylet"),
        ("/x/bin/python -u /y/dashboard/agent.py --port=1", "agent.py"),
        ("/x/python3.11 -m vllm.engine", "vllm.engine"),
        ("", "?"),
    ],
)
def test_names_of_processes(command: str, name: str) -> None:
    assert name_of(command) == name
