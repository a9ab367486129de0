"""``tandem models distill`` on a tiny classifier."""

import json

import pytest
from typer.testing import CliRunner

from cluster.cli.app import app
from cluster.errors import ConfigError, DataError
from cluster.models.distill import kept_layers
from cluster.models.predict import Classifier
from tests.serve.planted import tandem, write_csv


def test_the_student_has_fewer_layers_and_its_teachers_labels(trained, data, tmp_path):
    teacher, _ = trained
    out = tmp_path / "student"
    said = tandem("models", "distill", teacher, "--data", data, "--layers", 1, "--out", out,
                  "--threads", 1, "--learning-rate", 0.003, "--max-tokens", 16)  # fmt: skip
    assert "1 of 2 layers; accuracy 1.0 (teacher 1.0)" in said
    assert "100.0% equal labels" in said
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    student = Classifier.load(out)
    assert student.names == ("complaint", "praise")
    logits = student.logits(["thanks word1", "word2 refund"], lambda message, fraction: None)
    assert logits.argmax(1).tolist() == [1, 0]
    assert f"| teacher | {teacher} |" in (out / "README.md").read_text()


def test_layers_are_spaced_evenly_and_end_with_the_last():
    assert kept_layers(6, 3) == [1, 3, 5]
    assert kept_layers(12, 4) == [2, 5, 8, 11]
    assert kept_layers(7, 3) == [1, 4, 6]


@pytest.mark.parametrize("layers", [2, 5])
def test_a_student_that_is_not_smaller_is_refused(trained, data, tmp_path, layers):
    args = ["models", "distill", str(trained[0]), "--data", str(data), "--layers", str(layers)]
    done = CliRunner().invoke(app, [*args, "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, ConfigError)
    assert f"layers: got {layers}; the model has 2, so 1 to 1 remain" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_labels_that_the_teacher_does_not_know_are_refused(trained, tmp_path):
    data = write_csv(tmp_path / "rows.csv", [("a word1", "complaint"), ("b word2", "Praises")])
    args = ["models", "distill", str(trained[0]), "--data", str(data), "--layers", "1"]
    done = CliRunner().invoke(app, [*args, "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, DataError)
    assert "unknown label 'Praises'; allowed: complaint, praise" in str(done.exception)
