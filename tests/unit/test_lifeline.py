import os

import pytest

from cluster.engines import lifeline


def test_a_process_that_nobody_spawned_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lifeline.PARENT_VARIABLE, str(os.getppid()))
    lifeline.bind_to_parent()


@pytest.mark.parametrize(
    ("value", "bound"), [("", False), ("x", False), (str(os.getpid()), False), ("1", True)]
)
def test_only_descendants_of_an_engine_are_bound(
    monkeypatch: pytest.MonkeyPatch, value: str, bound: bool
) -> None:
    monkeypatch.setenv(lifeline.PARENT_VARIABLE, value)
    assert lifeline._is_bound() is bound
