"""``tandem rollout --wait`` and ``--set``."""

from typing import Any

import pytest

from cluster.cli import rollout as command
from cluster.errors import ConfigError, RolloutError, UnavailableError


class Client:
    """Router that reports one list of rollouts after the other."""

    def __init__(self, *reports: list[dict[str, Any]] | None) -> None:
        self.reports = iter(reports)

    def get(self, path: str) -> Any:
        report = next(self.reports)
        if report is None:
            raise UnavailableError("no router responds")
        return {"data": report}


def report(phase: str, *, is_paused: bool = False, version: str = "2") -> list[dict[str, Any]]:
    decisions = [{"time": 0.0, "decision": "x", "reason": "because"}]
    fields = {"phase": phase, "is_paused": is_paused, "version": version, "to": "n"}
    return [{"model": "g", "decisions": decisions, **fields}]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(command.time, "sleep", lambda s: now.__setitem__(0, now[0] + 60))


def follow(*reports: list[dict[str, Any]] | None) -> None:
    command._follow(Client(*reports), "g", "2")  # type: ignore[arg-type]


def test_waiting_ends_with_the_promotion() -> None:
    follow([], None, report("promoted", version="1"), report("canary"), report("promoted"))


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (report("rolled_back"), "rolled back: because"),
        (report("cancelled"), "a configuration without it was deployed"),
        (report("canary", is_paused=True), "paused: because; continue with"),
    ],
)
def test_waiting_fails_if_the_rollout_does_not_go_on(
    last: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(RolloutError, match=message):
        follow(report("canary"), last)


@pytest.mark.parametrize("other", [None, [], report("canary", version="3")])
def test_waiting_fails_if_the_rollout_vanishes(other: list[dict[str, Any]] | None) -> None:
    with pytest.raises(RolloutError, match="unknown since 300 s"):
        follow(report("canary"), *[other] * 10)


@pytest.mark.parametrize("pair", ["shadow=true", "canary=[5, 100]", "model=x"])
def test_fields_with_an_option_are_refused_in_set(pair: str) -> None:
    with pytest.raises(ConfigError, match="use the option --"):
        command.parse_settings([pair])
    assert command.parse_settings(["min_requests=50"]) == {"min_requests": 50}
