import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from cluster.models import calibration, finetune_report, reference
from cluster.models.calibration import calibrate, expected_calibration_error, softmax
from cluster.models.reference import Reference, stability_index


def miscalibrated(temperature, num_texts=20_000, num_labels=3):
    """Return labels, and ``temperature`` times the logits they were drawn from."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (num_texts, num_labels))
    drawn = random.random((num_texts, 1))
    truth = (softmax(logits).cumsum(1) < drawn).sum(1).clip(0, num_labels - 1)
    return logits * temperature, truth


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_calibrate_finds_a_known_temperature(temperature):
    logits, truth = miscalibrated(temperature)
    found = calibrate(logits, truth)
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert found.ece_after < 0.015
    if temperature != 1.0:
        assert found.ece_before > 0.05
    assert (softmax(logits / found.temperature).argmax(1) == logits.argmax(1)).all()


def test_calibration_error_matches_a_manual_calculation():
    scores = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    assert expected_calibration_error(scores, np.array([0, 1, 1, 1])) == pytest.approx(0.4)
    assert expected_calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0


def test_calibrate_rejects_texts_without_an_optimum():
    logits = np.array([[5.0, 0.0], [0.0, 5.0]] * 50)
    with pytest.raises(ConfigError, match="100% of them correctly"):
        calibrate(logits, np.array([0, 1] * 50))
    with pytest.raises(ConfigError, match="labels 0% of them"):
        calibrate(logits, np.array([1, 0] * 50))


def test_temperature_is_stored_in_the_model_directory(tmp_path):
    assert calibration.read_temperature(tmp_path) == 1.0
    assert calibration.read_temperature(tmp_path / "none") == 1.0
    logits, truth = miscalibrated(2.0, 500)
    found = calibrate(logits, truth)
    calibration.write(tmp_path, found)
    assert calibration.read_temperature(tmp_path) == found.temperature


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"temperature": "x"}', '{"temperature": 0}'])
def test_a_damaged_calibration_is_an_error(tmp_path, text):
    (tmp_path / calibration.FILE).write_text(text)
    with pytest.raises(ConfigError, match="temperature"):
        calibration.read_temperature(tmp_path)


@given(
    st.integers(2, 20).flatmap(
        lambda n: st.tuples(*[st.lists(st.integers(0, 1000), min_size=n, max_size=n)] * 2)
    )
)
def test_stability_index_is_symmetric_and_positive(pair):
    left, right = pair
    assert stability_index(left, left) == 0
    assert stability_index(left, right) >= 0
    assert stability_index(left, right) == pytest.approx(stability_index(right, left))


def test_stability_index_matches_a_manual_calculation():
    expected = 0.3 * np.log(0.5 / 0.2) + 0.3 * np.log(0.8 / 0.5)
    assert stability_index([50_000, 50_000], [20_000, 80_000]) == pytest.approx(expected, rel=1e-3)
    assert stability_index([500] * 10, [50] * 10) == pytest.approx(0, abs=1e-9)
    assert 0.25 < stability_index([1000, 0], [900, 100]) < 1


def test_reference_counts_texts_and_is_read_back(tmp_path):
    assert Reference.read(tmp_path) is None
    scores = np.array([[0.9, 0.1], [1.0, 0.0], [0.3, 0.7]])
    found = Reference.from_scores(scores, [0, 1, 3], ("no", "yes"))
    assert found.labels == {"no": 2, "yes": 1}
    assert (found.confidence[-1], found.confidence[14], sum(found.confidence)) == (1, 1, 3)
    assert found.length[:4] == [1, 1, 1, 0]
    found.write(tmp_path)
    assert Reference.read(tmp_path) == found


@pytest.mark.parametrize(
    ("length", "bin_index"),
    [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (1023, 10), (1024, 11), (9**9, 17)],
)
def test_lengths_are_counted_by_powers_of_two(length, bin_index):
    counts = reference.count_lengths(np.array([length]))
    assert (counts.argmax(), counts.sum()) == (bin_index, 1)


@pytest.mark.parametrize("change", [{"length": [1, 2]}, {"labels": 3}, {"confidence": ["a"]}])
def test_a_damaged_reference_is_an_error(tmp_path, change):
    Reference.from_scores(np.array([[0.9, 0.1]]), [1], ("no", "yes")).write(tmp_path)
    raw = json.loads((tmp_path / reference.FILE).read_text())
    (tmp_path / reference.FILE).write_text(json.dumps({**raw, **change}))
    with pytest.raises(ConfigError, match=reference.FILE):
        Reference.read(tmp_path)


def test_metrics_of_a_confusion_matrix():
    truth, found = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 1])
    matrix = finetune_report.confusion_matrix(truth, found, 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert finetune_report.accuracy(matrix) == pytest.approx(4 / 6)
    assert finetune_report.metrics_by_label(matrix)[0].tolist() == pytest.approx([1, 2 / 3, 0.8])
    assert finetune_report.macro_f1(matrix) == pytest.approx((0.8 + 2 / 3) / 4)
