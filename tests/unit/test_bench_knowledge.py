"""The knowledge benchmark: its questions, ranks and report."""

import json
from pathlib import Path

import pytest

from benchmarks.knowledge import (
    MODES,
    QUESTIONS,
    ROOT,
    make_report,
    pools,
    rank_of,
    recall,
    reciprocal_rank,
)
from cluster.applications.knowledge.readers.text import read_markdown
from cluster.config import parse


def test_each_question_has_a_section() -> None:
    for asked in json.loads(QUESTIONS.read_text(encoding="utf-8"))["answered"]:
        text = (ROOT / "docs" / asked["document"]).read_text(encoding="utf-8")
        headings = {block.heading[-1] for block in read_markdown(text).blocks if block.level}
        assert asked["heading"] in headings, asked


def test_ranks() -> None:
    passages = [
        {"document": "a.md", "heading": ["A", "B"]},
        {"document": "b.md", "heading": ["A", "C"]},
        {"document": "b.md", "heading": ["A", "B", "D"]},
    ]
    assert rank_of({"document": "b.md", "heading": "B"}, passages) == 3
    assert rank_of({"document": "c.md", "heading": "B"}, passages) is None
    assert recall([1, 6, None, 5]) == 0.5
    assert reciprocal_rank([1, 2, None, None]) == pytest.approx(0.375)


def test_its_configuration_is_valid_and_its_report_complete(tmp_path: Path) -> None:
    assert parse(pools(tmp_path)).applications is not None
    ranks = {("minilm", mode): [1, 2] for mode in MODES}
    relevance = {"minilm": {"answered": [0.6], "unanswered": [0.1]}}
    rates = {"ingest minilm": [90.0], "encoder alone": [100.0]}
    report = make_report(ranks, relevance, rates, [20.0])
    assert report.keys["ingest_share_of_encoder"].median == pytest.approx(0.9)
    assert report.keys["minilm_hybrid_mrr"].median == 0.75
