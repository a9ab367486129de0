"""Agreement of low precision with float32: measuring, saving, requiring."""

import json

import numpy as np
import pytest

from cluster.config import ClassifierConfig
from cluster.engines.classifier.model import agreement, build
from cluster.engines.classifier.model.agreement import (
    Agreement,
    AgreementStore,
    batches_by_length,
    cosines,
    measure_agreement,
    require_agreement,
)
from cluster.engines.classifier.model.check_texts import FILE, check_texts
from cluster.engines.classifier.serving.tasks import TASKS
from cluster.errors import ConfigError, DataError
from tests.serve.classifier_kit import TEXTS, one_thread, running, save  # noqa: F401


def texts(*lengths):
    return [np.zeros(length, np.int64) for length in lengths]


def test_agreement_counts_labels_and_cosines():
    scores = np.eye(4, dtype=np.float32)

    def full(task, ids):
        return scores[: len(ids)]

    def low(task, ids):
        rows = scores[: len(ids)].copy()
        rows[-1] = rows[-1][::-1]
        return rows

    ids = texts(3, 4, 5, 6)
    assert measure_agreement("classify", low, full, ids) == Agreement(0.75, 4)
    assert measure_agreement("embed", low, full, ids) == Agreement(0.75, 4)
    assert measure_agreement("classify", full, full, ids).share == 1.0


def test_cosines_are_defined_for_rows_of_zeros():
    found = np.array([[3, 0], [1, 1], [0, 0], [0, 0]], np.float32)
    wanted = np.array([[2, 0], [1, -1], [0, 0], [1, 0]], np.float32)
    assert cosines(found, wanted).tolist() == [1, 0, 1, 0]


def test_agreement_compares_each_token_and_the_best_token_of_each_mask():
    ids = texts(2, 2)
    tokens = [np.eye(3, dtype=np.float32)[row] for row in ([0, 1, 2], [2])]
    other = [tokens[0], tokens[0][:1]]
    same = measure_agreement("token-classification", lambda *_: other, lambda *_: tokens, ids)
    assert same == Agreement(0.75, 4)
    masks = [np.array([[7, 3, 0.9, 0.1]]), np.array([[5, 3, 0.6, 0.4]])]
    swapped = [masks[0], np.array([[3, 5, 0.5, 0.5]])]
    assert measure_agreement("fill-mask", lambda *_: swapped, lambda *_: masks, ids) == Agreement(
        0.5, 2
    )


def test_agreement_on_multiple_labels_needs_all_of_them():
    wanted = np.array([[0.9, 0.6, 0.1], [0.9, 0.6, 0.1], [0.3, 0.2, 0.1]], np.float32)
    found = np.array([[0.7, 0.51, 0.4], [0.9, 0.49, 0.1], [0.2, 0.3, 0.1]], np.float32)
    ids = texts(2, 3, 4)
    several = "multi_label_classification"
    same = measure_agreement("classify", lambda *_: found, lambda *_: wanted, ids, several)
    assert same == Agreement(2 / 3, 3)


@pytest.mark.parametrize("width", [1, 2])
def test_agreement_on_numbers_is_relative_to_their_spread(width):
    ids = texts(*range(2, 35))  # more than one batch
    numbers = {len(row): np.full(width, len(row) / 10, np.float32) for row in ids}

    def full(task, some):
        return np.stack([numbers[len(row)] for row in some])

    def low(task, some):
        rows = full(task, some) + 0.01
        return rows + [[0.1 * (len(row) == 20)] * width for row in some]

    assert measure_agreement("classify", low, full, ids, "regression") == Agreement(32 / 33, 33)


@pytest.mark.parametrize("name", TASKS)
def test_agreement_is_measured_for_the_heads_of_the_tasks(name):
    pool = ClassifierConfig(name="one", model="one", tasks=(name,))
    heads = {"embed": "embed", "embed-sparse": "fill-mask", "fill-mask": "fill-mask"}
    heads["token-classification"] = "token-classification"
    assert build.computed_heads(pool) == (heads.get(name, "classify"),)


@pytest.mark.parametrize(
    ("tasks", "head", "labels"),
    [
        (("token-classification", "embed"), "ForTokenClassification", {0: "O", 1: "B-PER"}),
        (("fill-mask", "embed"), "ForMaskedLM", {0: "O"}),
        (("next-sentence",), "ForNextSentencePrediction", {0: "next", 1: "not"}),
        (("score", "rerank"), "ForSequenceClassification", {0: "relevance"}),
    ],
)
async def test_every_head_is_measured_before_it_computes_in_bfloat16(
    tmp_path, monkeypatch, tasks, head, labels
):
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(
        agreement, "MIN_AGREEMENT", 0
    )  # random networks have close scores and disagree often
    model = save(tmp_path / "model", head=head, labels=labels)
    (tmp_path / "model" / FILE).write_text("".join(f'{{"text": "{t}"}}\n' for t in TEXTS))
    async with running(model, *tasks, dtype="bfloat16") as engine:
        assert 0 < engine.counts().agreement <= 1


def test_too_little_agreement_is_refused():
    pool = ClassifierConfig(name="mood", model="mood", dtype="int8")
    require_agreement(pool, Agreement(0.995, 400), "int8")
    with pytest.raises(ConfigError, match=r"mood\.dtype: int8 agrees .* 99\.00% of 400 .* 99\.5%"):
        require_agreement(pool, Agreement(0.99, 400), "int8")


def test_agreement_is_saved_until_the_model_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    kept = AgreementStore(str(model), "bfloat16")
    assert kept.read() is None
    kept.write(Agreement(0.999, 400))
    assert AgreementStore(str(model), "bfloat16").read() == Agreement(0.999, 400)
    assert AgreementStore(str(model), "int8").read() is None

    link = tmp_path / "elsewhere" / model.name
    link.parent.mkdir()
    link.symlink_to(model)
    assert AgreementStore(str(link), "bfloat16").read() == Agreement(0.999, 400)
    (model / "model.safetensors").write_bytes(b"other weights")
    assert AgreementStore(str(model), "bfloat16").read() is None


def test_check_texts_are_the_models_own_or_generated(tmp_path):
    ours = check_texts(str(tmp_path))
    assert ours == check_texts(str(tmp_path))
    lengths = [len(text.split()) for text in ours]
    assert len(set(ours)) > 350
    assert min(lengths) < 8
    assert max(lengths) > 80
    lines = [json.dumps({"text": text}) for text in ("one", "two")]
    (tmp_path / FILE).write_text("\n".join(lines) + "\n")
    assert check_texts(str(tmp_path)) == ["one", "two"]


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b'{"text": 1}', b'{"label": "a"}', b'{"text": "\xff"}']
)
def test_check_texts_that_cannot_be_read_are_named(tmp_path, line):
    (tmp_path / FILE).write_bytes(b'{"text": "one"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=r"held_out\.jsonl:3: expected"):
        check_texts(str(tmp_path))


def test_check_batches_ascend_in_length():
    made = batches_by_length(texts(*range(1, 71)))
    assert [len(batch) for batch in made] == [32, 32, 6]
    assert [len(row) for batch in made for row in batch] == list(range(1, 71))
