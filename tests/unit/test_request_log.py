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


def end(journal: RequestLog, identity: str, status: int = 200, body: bytes = b"") -> None:
    outcome = outcome_of(status)
    if journal.wants(outcome):
        journal.write(
            RequestRecord(identity, "/v1/chat/completions", status, outcome, model="m"), body
        )


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(200, "ok"), (304, "ok"), (404, "refused"), (429, "refused"), (499, "left"), (503, "failed")],
)
def test_the_status_says_how_it_ended(status: int, outcome: str) -> None:
    assert outcome_of(status) == outcome
    assert outcome_of(status, cut_off=True) == "cut_off"


def test_a_line_is_json_without_any_text_of_the_request(lines: Any) -> None:
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


def test_a_prompt_is_logged_where_that_is_wanted_and_no_more_of_it_than_so_much(lines: Any) -> None:
    journal = RequestLog(10, log_prompts=True)
    end(journal, "a", body=b'{"prompt": "short"}')
    end(journal, "b", body="é".encode() * 5000)
    first, second = lines()
    assert first["body"] == '{"prompt": "short"}'
    assert second["body"] == "é" * 2000


def test_above_the_rate_a_sample_is_logged_and_the_rest_counted(lines: Any) -> None:
    clock = Clock()
    journal = RequestLog(5, clock=clock)
    for number in range(1000):
        end(journal, str(number))
    assert [line["id"] for line in lines()] == ["0", "1", "2", "3", "4"]
    clock.now += 0.2
    end(journal, "later")
    assert lines()[-1]["id"] == "later"
    assert lines()[-1]["skipped"] == 995
    clock.now += 3600
    for number in range(1000):
        end(journal, str(number))
    assert len(lines()) == 6 + 5


def test_failures_are_logged_when_there_are_many_other_requests_and_bounded_too(lines: Any) -> None:
    journal = RequestLog(2, clock=Clock())
    for number in range(100):
        end(journal, str(number))
    for number in range(100):
        end(journal, f"bad {number}", 503)
    assert [line["id"] for line in lines()] == ["0", "1", "bad 0", "bad 1"]


def test_a_rate_of_nothing_logs_nothing(lines: Any) -> None:
    journal = RequestLog(0)
    end(journal, "a")
    end(journal, "b", 500)
    assert lines() == []
    assert [failure.id for failure in journal.failures] == ["b"]


def test_refusals_do_not_push_failures_out() -> None:
    journal = RequestLog(1)
    end(journal, "broken", 500)
    for number in range(10 * MAX_FAILURES):
        end(journal, str(number), 429)
    end(journal, "fine")
    found = journal.failures
    assert len(found) == 1 + MAX_FAILURES
    assert (found[0].id, found[0].status, found[0].type) == ("broken", 500, "InternalServerError")
    assert {failure.type for failure in found[1:]} == {"RateLimitError"}
