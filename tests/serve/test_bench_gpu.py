"""``bench gpu``'s measurement of the classifier, on a CPU with a small model."""

from pathlib import Path

import pytest
from transformers import BertForSequenceClassification

from benchmarks.gpu import encoder
from tests.serve import tiny_bert


def test_rates_of_matrices_and_batches_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = BertForSequenceClassification(tiny_bert.tiny_config(7))
    path = tiny_bert.save(tmp_path / "model", ["a", "b"], network=network)
    monkeypatch.setattr(encoder, "BATCHES", ((2, 8), (3, 16)))
    result = encoder.measure(str(path), "cpu", 2, sizes=(32,), run_s=0.001)
    assert result.matmul_flops_s > 0
    assert {batch: len(rates) for batch, rates in result.texts_s.items()} == {(2, 8): 2, (3, 16): 2}
    assert result.shape == encoder.Shape(layers=2, width=32, inner=64)
    report = encoder.make_report(result)
    assert report.keys["encoder_matmul_share_2x8"].median > 0
