"""Tensor parallelism of two in a Serve replica's placement group, on a model the test makes."""

from pathlib import Path
from typing import Any

import httpx
import yaml

from cluster.models import store
from tests.cluster.conftest import Running
from tests.cluster.tiny_llama import make_tiny_llama


def test_two_workers_answer_as_one(make_cluster: Any, tmp_path: Path) -> None:
    model = tmp_path / "tiny-llama"
    make_tiny_llama(model, store.resolve("smollm2-135m-instruct"))
    generator = {
        "model": str(model),
        "max_model_len": 256,
        "kv_cache_memory_bytes": "64MiB",
        "dtype": "float32",
        "resources": {"cpus": 0.4},
    }
    config = {
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [
            {
                "name": "tandem",
                "route_prefix": "/",
                "import_path": "deployments.app:build",
                "args": {
                    "generators": [
                        {"name": "two", "tensor_parallel_size": 2, **generator},
                        {"name": "one", **generator},
                    ],
                },
            }
        ],
    }
    file = tmp_path / "tp.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    cluster: Running = make_cluster("--config", str(file))
    try:
        texts = {}
        for name in ("one", "two"):
            body = {"model": name, "prompt": "Hello there", "max_tokens": 24, "temperature": 0}
            answer = httpx.post(f"{cluster.http_url}/v1/completions", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            texts[name] = answer.json()["choices"][0]["text"]
        assert texts["one"] == texts["two"]
    finally:
        assert cluster.tandem("down").returncode == 0
