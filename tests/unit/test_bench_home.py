"""Command lines that benchmarks record."""

import sys

from benchmarks.targets.home import new_home


def test_a_home_records_commands_with_their_own_variables_and_without_paths() -> None:
    with new_home("test") as home:
        environment = {"THREADS": "0 1", "CACHE": str(home.path), "NO_COLOR": "1"}
        home.run(sys.executable, "-c", "pass", timeout_s=60, environment=environment)
    assert home.commands == ["CACHE=HOME THREADS='0 1' .venv/bin/python -c pass"]
