import json
import logging
from typing import Any

import pytest

from cluster.gateway.recording.request_log import (
    LOGGER,
    MAX_FAILURES,
    RequestLog,
    RequestRecord,
    outcome_of,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, LOGGER)
    return lambda: [json.loads(record.message) for record in caplog.records]


def end(request_log: RequestLog, identity: str, status: int = 200, body: bytes = b"") -> None:
    outcome = outcome_of(status)
    if request_log.wants(outcome):
        request_log.write(
            RequestRecord(identity, "/v1/chat/completions", status, outcome, model="m"), body
        )


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(200, "ok"), (304, "ok"), (404, "refused"), (429, "refused"), (499, "left"), (503, "failed")],
)
def test_outcome_follows_from_the_status(status: int, outcome: str) -> None:
    assert outcome_of(status) == outcome
    assert outcome_of(status, cut_off=True) == "cut_off"


def test_line_is_json_without_the_requests_text(lines: Any) -> None:
    end(RequestLog(10), "abc", body=b'{"prompt": "secret"}')
    (line,) = lines()
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "id": "abc",
        "route": "/v1/chat/completions",
        "status": 200,
        "outcome": "ok",
        "model": "m",
    }


def test_prompt_is_logged_on_request_and_truncated(lines: Any) -> None:
    request_log = RequestLog(10, log_prompts=True)
    end(request_log, "a", body=b'{"prompt": "short"}')
    end(request_log, "b", body="é".encode() * 5000)
    first, second = lines()
    assert first["body"] == '{"prompt": "short"}'
    assert second["body"] == "é" * 2000


def test_lines_above_the_rate_are_skipped_and_counted(lines: Any) -> None:
    clock = Clock()
    request_log = RequestLog(5, clock=clock)
    for number in range(1000):
        end(request_log, str(number))
    assert [line["id"] for line in lines()] == ["0", "1", "2", "3", "4"]
    clock.now += 0.2
    end(request_log, "later")
    assert lines()[-1]["id"] == "later"
    assert lines()[-1]["skipped"] == 995
    clock.now += 3600
    for number in range(1000):
        end(request_log, str(number))
    assert len(lines()) == 6 + 5


def test_failures_have_a_rate_limit_of_their_own(lines: Any) -> None:
    request_log = RequestLog(2, clock=Clock())
    for number in range(100):
        end(request_log, str(number))
    for number in range(100):
        end(request_log, f"bad {number}", 503)
    assert [line["id"] for line in lines()] == ["0", "1", "bad 0", "bad 1"]


def test_rate_zero_logs_nothing(lines: Any) -> None:
    request_log = RequestLog(0)
    end(request_log, "a")
    end(request_log, "b", 500)
    assert lines() == []
    assert [failure.id for failure in request_log.failures] == ["b"]


def test_refusals_do_not_displace_failures() -> None:
    request_log = RequestLog(1)
    end(request_log, "broken", 500)
    for number in range(10 * MAX_FAILURES):
        end(request_log, str(number), 429)
    end(request_log, "fine")
    found = request_log.failures
    assert len(found) == 1 + MAX_FAILURES
    assert (found[0].id, found[0].status, found[0].type) == ("broken", 500, "InternalServerError")
    assert {failure.type for failure in found[1:]} == {"RateLimitError"}
