"""``tandem models compare`` for classifiers: tiny random models, in the engine's own code."""

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cluster.cli.app import app
from cluster.engines.classifier.comparison import Version, compare_classifiers
from cluster.errors import ConfigError, DataError
from tests.serve import classifier_kit
from tests.serve.word_bert import (
    TEXTS,
    expected,
    make_bert,
    make_distilbert,
    make_word_tokenizer,
    save_model,
)


def quiet(message, fraction):
    pass


def compare(a, b, texts=TEXTS, dtypes=("float32", "float32")):
    versions = [Version(path.name, path, dtype) for path, dtype in zip((a, b), dtypes, strict=True)]
    return compare_classifiers(*versions, texts, quiet)


def command(*args):
    return CliRunner().invoke(app, ["models", "compare", *map(str, args)], env={"COLUMNS": "120"})


@pytest.fixture
def teacher(tmp_path):
    save_model(tmp_path / "teacher", make_bert())
    return tmp_path / "teacher"


def test_two_classifiers_are_compared_by_their_scores(teacher, tmp_path):
    networks = make_bert().eval(), make_distilbert().eval()
    with torch.no_grad():
        networks[1].classifier.bias[:] = torch.tensor([0.0, 0.0, 3.0])
    save_model(tmp_path / "student", networks[1])
    found = compare(teacher, tmp_path / "student")
    one, other = (expected(network, TEXTS)[0] for network in networks)
    assert found.num_answers == len(TEXTS)
    assert found.agreement == np.mean(one.argmax(1) == other.argmax(1))
    assert found.difference == pytest.approx(np.abs(one - other).mean(), abs=1e-5)
    assert found.difference > 0.01
    assert [found.a.model, found.b.model] == ["teacher", "student"]
    assert min(found.a.texts_per_s, found.b.texts_per_s) > 0
    for figures, network in zip((found.a, found.b), networks, strict=True):
        weights = sum(4 * tensor.numel() for tensor in network.parameters())
        assert figures.size_bytes > weights
        # The packed BERT has no vectors of token types, and its last layer's projections twice.
        assert figures.memory_bytes == pytest.approx(weights, rel=0.3)


def test_bfloat16_takes_half_the_memory(teacher):
    found = compare(teacher, teacher, dtypes=("float32", "bfloat16"))
    assert found.b.memory_bytes == found.a.memory_bytes / 2
    assert found.b.size_bytes == found.a.size_bytes
    assert found.difference < 0.05


def test_int8_is_made_from_the_models_own_texts(teacher):
    found = compare(teacher, teacher, dtypes=("float32", "int8"))
    assert (found.a.dtype, found.b.dtype) == ("float32", "int8")
    assert found.b.memory_bytes < found.a.memory_bytes
    assert found.difference < 0.05


def test_embeddings_are_compared_by_their_cosine(tmp_path):
    for name, size in (("one", {}), ("wide", {"hidden_size": 48})):
        classifier_kit.save(tmp_path / name, head="", **size)
    texts = ["a good film", "the plot was dull"]
    found = compare(tmp_path / "one", tmp_path / "one", texts, ("float32", "bfloat16"))
    assert (found.num_answers, found.agreement) == (2, 1.0)
    assert 0 <= found.difference < 0.01
    with pytest.raises(ConfigError, match="one and wide have embeddings of different sizes"):
        compare(tmp_path / "one", tmp_path / "wide", texts)


def test_labels_of_tokens_are_compared_token_by_token(tmp_path):
    saved = classifier_kit.save(tmp_path / "ner", head="ForTokenClassification")
    texts = ["a good film", "dull"]
    found = compare(tmp_path / "ner", tmp_path / "ner", texts)
    assert found.num_answers == sum(len(ids) for ids in saved.tokenizer(texts)["input_ids"])
    assert (found.agreement, found.difference) == (1.0, 0.0)
    save_model(tmp_path / "mood", make_bert())
    with pytest.raises(ConfigError, match="different tasks: token-classification and classify"):
        compare(tmp_path / "ner", tmp_path / "mood", texts)


def test_the_rate_of_a_large_file_is_measured_on_a_part_of_it(teacher):
    texts = [f"{text} film" for text in TEXTS] * 100
    found = compare(teacher, teacher, texts)
    assert found.num_answers == len(texts)
    assert math.isfinite(found.a.texts_per_s)


def test_the_command_prints_a_table(teacher, tmp_path):
    data = tmp_path / "texts.csv"
    data.write_text("text\ngood film\nthe plot was dull\n")
    done = command(teacher, teacher, "--dtypes", "float32, bfloat16", "--data", data)
    assert done.exception is None, done.exception
    assert f"A: {teacher}\nB: {teacher}\n" in done.stdout
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.split()}
    assert rows["memory,"][-1] == "0.500"
    assert "texts/s" in rows
    assert "float32 and bfloat16: 100.00% of 2 answers equal" in done.stdout


def test_the_command_prints_json_for_the_models_own_texts(teacher):
    (teacher / "held_out.jsonl").write_text('{"text": "good film"}\n{"text": "dull"}\n')
    done = command(teacher, teacher, "--json")
    assert done.exception is None, done.exception
    found = json.loads(done.stdout)
    assert (found["num_answers"], found["agreement"], found["difference"]) == (2, 1.0, 0.0)
    assert found["a"] | {"texts_per_s": 0} == found["b"] | {"texts_per_s": 0}


def test_the_models_own_texts_are_read_only_without_others(teacher, tmp_path):
    (teacher / "held_out.jsonl").write_text("{\n")
    done = command(teacher, teacher)
    assert isinstance(done.exception, DataError), done.exception
    assert "held_out.jsonl:1: expected" in str(done.exception)
    data = tmp_path / "texts.csv"
    data.write_text("text\ngood film\n")
    done = command(teacher, teacher, "--data", data)
    assert done.exception is None, done.exception


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ("int8", "write two, such as float32,int8"),
        ("float32,int4", "dtype: got 'int4'; allowed: float32, bfloat16, float16, int8"),
    ],
)
def test_unknown_precisions_are_refused(teacher, dtypes, message):
    done = command(teacher, teacher, "--dtypes", dtypes)
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)


def test_int8_of_other_architectures_is_refused(tmp_path):
    save_model(tmp_path / "model", make_distilbert())
    with pytest.raises(ConfigError, match="int8 is for BERT on the CPU"):
        compare(tmp_path / "model", tmp_path / "model", dtypes=("float32", "int8"))


def test_models_that_cannot_be_compared_are_refused(teacher, tmp_path):
    other = tmp_path / "other"
    network = make_bert()
    network.config.id2label = {0: "bad", 1: "so-so", 2: "good"}
    save_model(other, network)
    labels = "negative, neutral, positive and bad, so-so, good"
    with pytest.raises(ConfigError, match=f"teacher and other have different labels: {labels}"):
        compare(teacher, other)
    save_model(other, make_bert(problem_type="multi_label_classification"))
    kinds = "single_label_classification and multi_label_classification"
    with pytest.raises(ConfigError, match=f"different problem types: {kinds}"):
        compare(teacher, other)
    (other / "config.json").write_text('{"architectures": ["ViTForImageClassification"]}')
    with pytest.raises(ConfigError, match="other is a ViTForImageClassification; encoders"):
        compare(teacher, other)
    (tmp_path / "empty").mkdir()
    make_word_tokenizer().save_pretrained(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"empty has no readable config\.json"):
        compare(teacher, tmp_path / "empty")
    (teacher / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot load"):
        compare(teacher, teacher)


@pytest.mark.parametrize(
    ("text", "message"),
    [("text\n \n", "got 0 rows; at least 1"), ("body\ngood film\n", "no column 'text'")],
)
def test_unusable_files_are_refused(teacher, tmp_path, text, message):
    data = tmp_path / "texts.csv"
    data.write_text(text)
    done = command(teacher, teacher, "--data", data)
    assert isinstance(done.exception, DataError)
    assert message in str(done.exception)
