"""The measurements of the knowledge benchmark, with scripted models."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from benchmarks import knowledge
from tests.serve.task_kit import task_world
from tests.serve.test_knowledge_clients import http_server


async def test_the_benchmark_measures_a_router(monkeypatch: pytest.MonkeyPatch) -> None:
    docs = [knowledge.ROOT / "docs" / "how-to" / f"{name}.md" for name in ("batches", "guards")]
    monkeypatch.setattr(knowledge, "ENCODERS", ("cls",))
    monkeypatch.setattr(knowledge, "documents", lambda: docs)
    questions = json.loads(knowledge.QUESTIONS.read_text(encoding="utf-8"))
    async with task_world() as tasks, http_server(tasks) as url:
        with httpx.Client(base_url=url, timeout=60) as client:
            rates = await asyncio.to_thread(knowledge.measure_ingest, client, 0)
            assert all(rate > 0 for rate in rates.values())
            ranks, found = await asyncio.to_thread(knowledge.measure_quality, client, questions)
            assert len(found["cls"]["unanswered"]) == len(questions["unanswered"])
            assert any(rank is not None for rank in ranks["cls", "text"])
            base = {"name": "large"}
            await asyncio.to_thread(client.post, knowledge.KNOWLEDGE_PATH, json=base)
            p95_ms = await asyncio.to_thread(knowledge.measure_queries, client, ["batches"], 5)
            assert p95_ms > 0


async def test_the_large_base_is_indexed(tmp_path: Path) -> None:
    assert await knowledge.fill_base(tmp_path, 200) > 0
