from pathlib import Path

import pytest

from benchmarks.__main__ import make_parser
from benchmarks.endpoint import TargetError
from benchmarks.engine import report
from benchmarks.engine.measure import (
    COMPLETION_TOKENS,
    PROMPT_TOKENS,
    EngineResult,
    PromptMaker,
    Setting,
    check_completion_tokens,
)
from benchmarks.engine.report import EngineRound, Rounds
from benchmarks.engine.servers import find_scale_events
from benchmarks.report import as_json

WORDS = ("Ġred", "Ġriver", "Ġstone", "Ġbridge", "stone", "ĠParis", "Ġ42nd")
VOCABULARY = {word: number for number, word in enumerate(WORDS)}


def cell(tokens_s: float, concurrent: int = 32) -> EngineResult:
    return EngineResult(concurrent, 64, tokens_s, 50.0, 90.0, 10.0, 20.0)


def rounds(*numbers: tuple[float, float]) -> list[EngineRound]:
    return [EngineRound(ready_s, (cell(tokens_s),)) for ready_s, tokens_s in numbers]


def test_prompts_use_only_plain_words_with_a_leading_space() -> None:
    assert PromptMaker.from_vocabulary(VOCABULARY).words == ("bridge", "river", "stone")


def test_prompts_differ_between_requests_and_rounds() -> None:
    prompts = PromptMaker.from_vocabulary(VOCABULARY)
    some = prompts.make_prompts(3, 0, 32)
    assert prompts.make_prompts(3, 0, 32) == some
    assert len({*some, *prompts.make_prompts(3, 1, 32), *prompts.make_prompts(3, 0, 8)}) == 9
    assert {len(prompt.split(" ")) - 1 for prompt in some} == {PROMPT_TOKENS}


def test_quick_runs_send_one_request_per_stream() -> None:
    assert Setting(0, 32, quick=True).num_requests == 32
    assert [Setting(0, num, quick=False).num_requests for num in (1, 8, 32)] == [4, 24, 64]


def test_a_response_of_the_wrong_length_is_an_error() -> None:
    usage = b'data: {"usage":{"completion_tokens": %d}}\n\n'
    check_completion_tokens(usage % COMPLETION_TOKENS)
    for response in (b"data: [DONE]\n\n", usage % (COMPLETION_TOKENS - 1)):
        with pytest.raises(TargetError, match=f"not {COMPLETION_TOKENS}"):
            check_completion_tokens(response)


def test_ratios_use_the_rounds_that_both_servers_have() -> None:
    rounds_by_server: Rounds = {
        "cluster": rounds((10.0, 300.0), (12.0, 200.0), (11.0, 330.0)),
        "vllm": rounds((40.0, 150.0), (30.0, 100.0)),
    }
    keys = report.make_report(rounds_by_server).keys
    assert keys["ratio_vs_vllm_serve"].rounds == (2.0, 2.0)
    assert keys["ready_ratio_vs_vllm_serve"].rounds == (0.25, 0.4)
    assert keys["cluster_tokens_s"].rounds == (300.0, 200.0, 330.0)
    assert "ratio_vs_serve_llm" not in keys


def test_a_round_without_a_concurrency_has_no_ratio_for_it() -> None:
    rounds_by_server: Rounds = {
        "cluster": [
            EngineRound(1.0, (cell(9.0, 8),)),
            EngineRound(1.0, (cell(9.0, 8), cell(30.0))),
        ],
        "serve-llm": [
            EngineRound(1.0, (cell(3.0, 8),)),
            EngineRound(1.0, (cell(3.0, 8), cell(10.0))),
        ],
    }
    keys = report.make_report(rounds_by_server).keys
    assert keys["ratio_vs_serve_llm"].rounds == (3.0,)
    assert keys["ratio_vs_serve_llm_at_8"].rounds == (3.0, 3.0)


def test_the_fastest_tuned_variant_of_each_round_is_the_peer() -> None:
    rounds_by_server: Rounds = {
        "cluster": rounds((10.0, 200.0), (10.0, 180.0)),
        "vllm-tuned": rounds((20.0, 100.0), (20.0, 200.0)),
        "vllm-tuned-iomp": rounds((20.0, 250.0)),
        "in-process": rounds((5.0, 200.0), (5.0, 200.0)),
    }
    made = report.make_report(rounds_by_server, {"vllm-tuned-iomp": "it exited with 1.\nlog"})
    assert made.keys["ratio_default_vs_tuned_vllm_at_32"].rounds == (0.8, 0.9)
    assert made.keys["ttft_ratio_vs_tuned_vllm_at_32"].rounds == (1.0, 1.0)
    assert made.keys["ratio_vs_in_process"].rounds == (1.0, 0.9)
    assert made.values["tokens_s_at_32"]["tuned"].rounds == (250.0, 200.0)
    assert "vllm-tuned-iomp failed: it exited with 1." in made.notes


def test_a_round_keeps_the_command_line_and_the_scale_events(tmp_path: Path) -> None:
    path = tmp_path / "rounds.json"
    one = EngineRound(1.0, (cell(9.0),), "tandem up", ("autoscaling: a from 1 to 2 replicas",))
    report.save_rounds(path, {"cluster": [one]})
    assert report.load_rounds(path) == {"cluster": [one]}
    made = report.make_report(report.load_rounds(path))
    assert "cluster, round 1, autoscaling: a from 1 to 2 replicas" in made.notes


def test_the_settings_are_those_of_all_rounds_without_paths() -> None:
    made = report.make_report(
        {"cluster": rounds((10.0, 300.0), (12.0, 200.0)), "vllm": rounds((40.0, 150.0))}
    )
    args = make_parser().parse_args(
        ["engine", "--rounds", "1", "--targets", "cluster", "--append", "/private", "--json", "/x"]
    )
    assert as_json(args, made)["settings"] == {
        "rounds": 2,
        "quick": False,
        "targets": ["cluster", "vllm"],
        "concurrent": [1, 8, 32],
    }


def test_scale_events_are_read_from_the_controllers_log(tmp_path: Path) -> None:
    (tmp_path / "serve").mkdir()
    lines = "INFO 2026 -- autoscaling: smollm2 from 1 to 1 replicas (cores): full\nINFO other\n"
    (tmp_path / "serve" / "controller_12.log").write_text(lines, encoding="utf-8")
    (tmp_path / "serve" / "replica_1.log").write_text(lines, encoding="utf-8")
    assert find_scale_events(tmp_path) == [
        "autoscaling: smollm2 from 1 to 1 replicas (cores): full"
    ]


def test_saved_rounds_are_loaded_again(tmp_path: Path) -> None:
    path = tmp_path / "rounds.json"
    assert report.load_rounds(path) == {}
    rounds_by_server: Rounds = {"cluster": rounds((10.0, 300.0), (12.0, 200.0))}
    report.save_rounds(path, rounds_by_server)
    assert report.load_rounds(path) == rounds_by_server
    report.save_rounds(None, rounds_by_server)
    assert report.load_rounds(None) == {}
