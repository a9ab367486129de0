"""``tandem models compare`` with scripted engines in place of vLLM's."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from typer.testing import CliRunner

from cluster.cli.app import app
from cluster.engines import comparison
from cluster.errors import BuildError, ConfigError

LOGPROBS = {"good": -1.0, "bad": -2.0}


class ScriptedEngine:
    """Engine whose tokens are the characters' codes.

    Every token of a text has the model's log probability. The good model's most likely token is
    always the text's; the bad model's is another one at each second position.
    """

    def __init__(self, name: str, offset: int = 0, status: int = 200) -> None:
        self._name = name
        self._offset = offset
        self._status = status
        self.calls: list[str] = []
        self.app = Starlette(
            routes=[
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
            ]
        )

    async def start(self) -> None:
        self.calls.append("start")

    async def stop(self) -> None:
        self.calls.append("stop")

    async def _tokenize(self, request: Request) -> Response:
        text = (await request.json())["prompt"]
        return JSONResponse({"tokens": [ord(letter) + self._offset for letter in text]})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        if self._status != 200:
            return JSONResponse({"error": "out of memory"}, self._status)
        if "prompt_logprobs" not in body:
            self.calls.append(f"generate {body['max_tokens']}")
            return JSONResponse({"usage": {"completion_tokens": body["max_tokens"]}})
        positions: list[Any] = [None]
        for index, token in enumerate(body["prompt"][1:]):
            options = {str(token): {"logprob": LOGPROBS[self._name]}}
            if self._name == "bad" and index % 2:
                options["7"] = {"logprob": -0.5}
            positions.append(options)
        return JSONResponse({"choices": [{"prompt_logprobs": positions}], "usage": {}})


def candidate(name: str, **fields: Any) -> comparison.Candidate:
    return comparison.Candidate(name, 100, ScriptedEngine(name, **fields))  # type: ignore[arg-type]


def quiet(message: str, fraction: float | None) -> None:
    pass


async def test_perplexity_and_agreement_are_those_of_the_texts() -> None:
    found = await comparison.compare(
        candidate("good"), candidate("bad"), ["abcdefghi", "z", "xyz"], quiet
    )
    assert found.a.perplexity == pytest.approx(math.e)
    assert found.b.perplexity == pytest.approx(math.e**2)
    assert found.num_tokens == 8 + 2  # the single letter has no second token
    assert found.agreement == pytest.approx(1 - (4 + 1) / 10)
    assert list(found.a.tokens_per_s) == list(found.b.tokens_per_s) == [1, 8, 32]
    for count, rate in found.b.tokens_per_s.items():
        slowest, fastest = found.b.tokens_per_s_range[count]
        assert 0 < slowest <= rate <= fastest


async def test_different_tokenizers_are_refused() -> None:
    with pytest.raises(ConfigError, match="good and bad have different tokenizers"):
        await comparison.compare(candidate("good"), candidate("bad", offset=1), ["abc"], quiet)


async def test_texts_of_one_token_are_refused() -> None:
    with pytest.raises(ConfigError, match="no text has two tokens"):
        await comparison.compare(candidate("good"), candidate("bad"), ["a", "b"], quiet)


async def test_an_engines_error_is_reported() -> None:
    with pytest.raises(BuildError, match=r"bad: /v1/completions answers 500:.*out of memory"):
        await comparison.compare(candidate("good"), candidate("bad", status=500), ["abc"], quiet)


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[ScriptedEngine]:
    made: list[ScriptedEngine] = []
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * 2**20)

    def make(config: Any) -> ScriptedEngine:
        made.append(ScriptedEngine(Path(config.model).name))
        return made[-1]

    monkeypatch.setattr(comparison, "make_generator_engine", make)
    monkeypatch.chdir(tmp_path)
    return made


def test_the_command_prints_a_table_and_stops_both_engines(engines: list[ScriptedEngine]) -> None:
    done = CliRunner().invoke(app, ["models", "compare", "good", "bad"], env={"COLUMNS": "120"})
    assert done.exception is None, done.exception
    assert "A: good\nB: bad\n" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["perplexity", "2.72", "7.39", "2.718"] in rows
    assert ["weights,", "MiB", "1", "1", "1.000"] in rows
    rate = r"[\d.]+ \([\d.]+-[\d.]+\)"
    assert re.search(rf"tokens/s, 32 concurrent +{rate} +{rate} +[\d.]+ *\n", done.stdout)
    assert "same greedy token: 5" in done.stdout
    assert [engine.calls[0] for engine in engines] == ["start", "start"]
    assert [engine.calls[-1] for engine in engines] == ["stop", "stop"]
    rounds = (comparison.NUM_ROUNDS + 1) * sum(comparison.CONCURRENCIES)
    assert [engine.calls.count("generate 32") for engine in engines] == [rounds, rounds]


def test_the_command_prints_json_for_the_users_texts(
    engines: list[ScriptedEngine], tmp_path: Path
) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "abcde"}\n')
    args = ["models", "compare", "good", "bad", "--data", str(data), "--json"]
    done = CliRunner().invoke(app, args)
    found = json.loads(done.stdout)
    assert found["num_tokens"] == 4
    assert found["a"]["model"] == "good"
    assert found["b"]["size_bytes"] == 2**20
