"""``vllm bench serve``, unchanged, against chat, completions and embeddings."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import ROOT, VENV, Server

NUM_PROMPTS = 8
BACKENDS = {
    "openai-chat": ("/v1/chat/completions", "smollm2", "smollm2-135m-instruct"),
    "openai": ("/v1/completions", "smollm2", "smollm2-135m-instruct"),
    "openai-embeddings": ("/v1/embeddings", "sentiment", "sentiment-minilm"),
}


@pytest.fixture(scope="module")
def results(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the benchmark with each backend and return its results."""
    directory = tmp_path_factory.mktemp("bench")
    runs = [
        [
            *("--backend", backend, "--base-url", server.url, "--endpoint", endpoint),
            *("--model", model, "--tokenizer", str(server.models / tokenizer)),
            *("--dataset-name", "random", "--num-prompts", str(NUM_PROMPTS)),
            *("--random-input-len", "16", "--random-output-len", "4"),
            *("--save-result", "--result-dir", str(directory)),
            *("--result-filename", f"{backend}.json"),
        ]
        for backend, (endpoint, model, tokenizer) in BACKENDS.items()
    ]
    done = subprocess.run(
        [VENV / "python", Path(__file__).with_name("bench_serve.py"), *map(json.dumps, runs)],
        cwd=ROOT,
        env={**os.environ, "OPENAI_API_KEY": server.key, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        backend: json.loads((directory / f"{backend}.json").read_text()) for backend in BACKENDS
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_requests_succeed(results: dict[str, Any], backend: str) -> None:
    assert results[backend]["completed"] == NUM_PROMPTS
    if backend != "openai-embeddings":
        assert results[backend]["total_output_tokens"] == NUM_PROMPTS * 4
