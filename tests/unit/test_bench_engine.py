import dataclasses
from pathlib import Path

import pytest

from benchmarks.endpoint import TargetError
from benchmarks.engine import result
from benchmarks.engine.cells import TOKENS, Cell, Wanted, check_usage
from benchmarks.engine.prompts import TOKENS as PROMPT_TOKENS
from benchmarks.engine.prompts import Prompts
from benchmarks.engine.result import Found, Round

WORDS = ("Ġred", "Ġriver", "Ġstone", "Ġbridge", "stone", "ĠParis", "Ġ42nd")
VOCABULARY = {word: number for number, word in enumerate(WORDS)}


def cell(tokens_s: float, concurrent: int = 32) -> Cell:
    return Cell(concurrent, 64, tokens_s, 50.0, 90.0, 10.0, 20.0)


def rounds(*numbers: tuple[float, float]) -> list[Round]:
    return [Round(ready_s, (cell(tokens_s),)) for ready_s, tokens_s in numbers]


def test_a_word_is_an_entry_that_begins_with_a_space_and_is_plain() -> None:
    assert Prompts.in_vocabulary(VOCABULARY).words == ("bridge", "river", "stone")


def test_prompts_differ_from_request_to_request_and_round_to_round() -> None:
    prompts = Prompts.in_vocabulary(VOCABULARY)
    some = prompts.some(3, 0, 32)
    assert prompts.some(3, 0, 32) == some
    assert len({*some, *prompts.some(3, 1, 32), *prompts.some(3, 0, 8)}) == 9
    assert {len(prompt.split(" ")) - 1 for prompt in some} == {PROMPT_TOKENS}


def test_quick_asks_once_for_each_concurrent_request() -> None:
    assert Wanted(0, 32, quick=True).requests == 32
    assert [Wanted(0, num, quick=False).requests for num in (1, 8, 32)] == [4, 24, 64]


def test_an_answer_of_another_length_is_an_error() -> None:
    check_usage(b'data: {"usage":{"completion_tokens":%d}}\n\n' % TOKENS)
    for answer in (b"data: [DONE]\n\n", b'data: {"usage":{"completion_tokens": 63}}\n\n'):
        with pytest.raises(TargetError, match="not 64"):
            check_usage(answer)


def test_ratios_are_taken_in_the_rounds_that_both_have() -> None:
    found: Found = {
        "cluster": rounds((10.0, 300.0), (12.0, 200.0), (11.0, 330.0)),
        "vllm-serve": rounds((40.0, 150.0), (30.0, 100.0)),
    }
    keys = result.report(found).keys
    assert keys["ratio_vs_vllm_serve"].rounds == (2.0, 2.0)
    assert keys["ready_ratio_vs_vllm_serve"].rounds == (0.25, 0.4)
    assert keys["cluster_tokens_s"].rounds == (300.0, 200.0, 330.0)
    assert "ratio_vs_serve_llm" not in keys


def test_a_number_of_requests_that_a_round_lacks_makes_no_ratio_of_it() -> None:
    found: Found = {
        "cluster": [Round(1.0, (cell(9.0, 8),)), Round(1.0, (cell(9.0, 8), cell(30.0)))],
        "serve-llm": [Round(1.0, (cell(3.0, 8),)), Round(1.0, (cell(3.0, 8), cell(10.0)))],
    }
    keys = result.report(found).keys
    assert keys["ratio_vs_serve_llm"].rounds == (3.0,)
    assert keys["ratio_vs_serve_llm_at_8"].rounds == (3.0, 3.0)


def test_rounds_that_are_kept_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "rounds.json"
    assert result.load(path) == {}
    found: Found = {"cluster": rounds((10.0, 300.0), (12.0, 200.0))}
    result.save(path, found)
    assert result.load(path) == found
    result.save(None, found)
    assert result.load(None) == {}


def test_each_number_of_a_cell_has_a_column() -> None:
    names = {field.name for field in dataclasses.fields(Cell)}
    assert names - set(result.NUMBERS) == {"concurrent", "requests"}
