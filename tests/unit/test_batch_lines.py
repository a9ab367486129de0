"""Validation of a batch's input, and the lines of its results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.batches import LineReader, check_lines, error_line, parse_line, result_line

CHAT = "/v1/chat/completions"
MAX_LINES, MAX_BYTES = 20, 500


def line(custom_id: str = "a", **fields: Any) -> dict[str, Any]:
    body = {"model": "gen", "messages": []}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body, **fields}


def opening(path: Path) -> Callable[[], IO[bytes]]:
    return lambda: path.open("rb")


def check(path: Path, *lines: Any) -> list[tuple[str, int | None]]:
    content = b"\n".join(
        each if isinstance(each, bytes) else json.dumps(each).encode() for each in lines
    )
    path.write_bytes(content)
    return [
        (error.code, error.line)
        for error in check_lines(opening(path), CHAT, {"gen"}, MAX_LINES, MAX_BYTES)[1]
    ]


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (b"{", "invalid_json_line"),
        (b"\xff", "invalid_json_line"),
        (b"[]", "invalid_request"),
        ({"custom_id": "b"}, "invalid_request"),
        (line("b", body=[]), "invalid_request"),
        (line("b", body={"model": 1}), "invalid_request"),
        (line("b", body={"model": "gen", "stream": True}), "invalid_request"),
        (line("b", body={"model": "other"}), "model_not_found"),
        (line("b", method="GET"), "invalid_method"),
        (line("b", url="/v1/completions"), "mismatched_endpoint"),
        (line("a"), "duplicate_custom_id"),
        (line(""), "invalid_custom_id"),
        (line("b", body={"model": "gen", "x": "y" * MAX_BYTES}), "line_too_long"),
    ],
)
def test_each_fault_is_reported_with_its_line(tmp_path: Path, wrong: Any, code: str) -> None:
    assert check(tmp_path / "in", line(), b"", wrong) == [(code, 3)]


def test_a_valid_file_is_counted_without_its_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "in"
    assert check(path, line("a"), b"", line("b"), b"  ") == []
    assert check_lines(opening(path), CHAT, {"gen"}, MAX_LINES, MAX_BYTES)[0] == 2


def test_an_empty_and_a_long_file_are_rejected(tmp_path: Path) -> None:
    assert check(tmp_path / "in") == [("empty_file", None)]
    lines = [line(str(number)) for number in range(MAX_LINES + 1)]
    assert check(tmp_path / "in", *lines) == [("too_many_requests", MAX_LINES + 1)]


_WORDS = st.sampled_from(
    [b"{", b"}", b'"', b"custom_id", b":", b"\\", b"\xff", b"1e999", b"[" * 90]
)


@given(lines=st.lists(st.lists(_WORDS, max_size=8).map(b"".join) | st.binary(max_size=60)))
def test_no_input_breaks_the_validation(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(b"\n".join(lines))
    num, errors = check_lines(opening(path), CHAT, {"gen"}, MAX_LINES, MAX_BYTES)
    # None of the generated lines is a request.
    assert bool(errors)
    assert len(errors) <= num + 1


def test_a_reader_returns_the_lines_that_have_no_result(tmp_path: Path) -> None:
    path = tmp_path / "in"
    check(path, line("a"), b"", line("b"), line("c"))
    found = LineReader(opening(path), {1, 4}, MAX_BYTES).read()
    assert [(number, parse_line(content).custom_id) for number, content in found] == [(3, "b")]


def test_results_are_one_line_of_json() -> None:
    answer = json.loads(result_line("a", 200, "r-1", b'{\n"x": 1\r\n}'))
    assert answer["custom_id"] == "a"
    assert answer["response"] == {"status_code": 200, "request_id": "r-1", "body": {"x": 1}}
    assert answer["error"] is None
    assert b"\n" not in result_line("a", 200, "r", b'{\n"x": 1}')
    assert json.loads(result_line("a", 502, "r", b"Bad"))["response"]["body"] == "Bad"
    failure = json.loads(error_line("a", "r", "batch_expired", "too late"))
    assert failure["error"] == {"code": "batch_expired", "message": "too late"}
    assert failure["response"] is None
