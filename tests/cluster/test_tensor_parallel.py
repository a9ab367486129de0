"""Tensor parallelism of 2 in a Serve replica's placement group, with a generated model.

``test_engine_processes`` compares the text of two workers with that of one.
"""

from pathlib import Path
from typing import Any

import httpx
import yaml

from cluster.launch import processes
from cluster.models import store
from tests.cluster.conftest import RunningCluster, serve_config
from tests.cluster.tiny_llama import make_tiny_llama


def test_two_workers_in_a_placement_group(make_cluster: Any, tmp_path: Path) -> None:
    model = tmp_path / "tiny-llama"
    make_tiny_llama(model, store.resolve("smollm2-135m-instruct"))
    generator = {
        "name": "two",
        "model": str(model),
        "tensor_parallel_size": 2,
        "max_model_len": 256,
        "kv_cache_memory_bytes": "64MiB",
        "dtype": "float32",
        "resources": {"cpus": 0.5},
    }
    file = tmp_path / "tp.yaml"
    file.write_text(yaml.safe_dump(serve_config(generators=[generator])), encoding="utf-8")
    cluster: RunningCluster = make_cluster("--config", str(file))
    try:
        body = {"prompt": "Hello there", "max_tokens": 24, "ignore_eos": True, "temperature": 0}
        texts = set()
        for _ in range(2):
            answer = httpx.post(f"{cluster.http_url}/v1/completions", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 24
            texts.add(answer.json()["choices"][0]["text"])
        assert len(texts) == 1
        names = " ".join(owned.name for owned in processes.find(cluster.home))
        assert names.count("VLLM::Worker") == 2, names
    finally:
        assert cluster.tandem("down").returncode == 0
