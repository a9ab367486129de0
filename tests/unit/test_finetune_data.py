import numpy as np
import pytest

from cluster.errors import DataError
from cluster.models.data_file import read_rows
from cluster.models.finetune_data import label_ids, label_names, similar_labels, split


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_labels_have_a_fixed_order(tmp_path):
    def names(*labels):
        text = "text,label\n" + "".join(f"t,{label}\n" for label in labels)
        path = write(tmp_path, "a.csv", text)
        return label_names(path, read_rows(path))

    assert names("yes", "no", "yes") == ("no", "yes")
    assert names("10", "9", "0") == ("0", "9", "10")
    assert names("1", "-1", "0") == ("-1", "0", "1")
    with pytest.raises(DataError, match="all 2 rows have the label 'yes'; at least two"):
        names("yes", "yes")
    with pytest.raises(DataError, match="no rows"):
        names()


def test_labels_unknown_to_the_model_are_errors(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\na,yes\nb,no\n")
    rows = read_rows(path)
    np.testing.assert_array_equal(label_ids(path, rows, ("no", "yes")), [1, 0])
    with pytest.raises(DataError, match=":3: unknown label 'no'; allowed: yes, maybe"):
        label_ids(path, rows, ("yes", "maybe"))
    with pytest.raises(DataError, match="did you mean 'YES'"):
        label_ids(path, rows, ("YES", "no"))


def test_models_trained_on_float_labels_can_be_calibrated(tmp_path):
    rows = read_rows(write(tmp_path, "a.csv", "text,label\na,1.0\nb,0\n"))
    np.testing.assert_array_equal(label_ids(tmp_path, rows, ("0.0", "1.0")), [1, 0])
    np.testing.assert_array_equal(label_ids(tmp_path, rows, ("0", "0.5", "1")), [2, 0])


def test_labels_that_differ_only_in_case_or_spaces_are_found(tmp_path):
    text = "text,label\na,yes\nb, Yes\nc,yes\nd,no\n"
    rows = read_rows(write(tmp_path, "a.csv", text))
    assert similar_labels(rows) == [{"yes": 2, " Yes": 1}]


def test_split_has_no_text_in_two_parts():
    texts = [f"text {i % 50}" if i % 2 else f" TEXT  {i % 50}" for i in range(200)]
    labels = ["yes" if i % 50 < 20 else "no" for i in range(200)]
    parts = split(texts, labels, ("no", "yes"), 0.1, 0.2)
    sizes = [len(part) for part in (parts.train, parts.validation, parts.held_out)]
    assert sizes == [35, 10, 5]
    sides = [
        {" ".join(text.lower().split()) for text, _ in part}
        for part in (parts.train, parts.validation, parts.held_out)
    ]
    assert len(set.union(*sides)) == 50
    assert [sum(label for _, label in part) for part in (parts.validation, parts.held_out)] == [
        4,
        2,
    ]
    everything = parts.train + parts.validation + parts.held_out
    assert all(label == int(int(text.split()[1]) < 20) for text, label in everything)
    assert split(texts, labels, ("no", "yes"), 0.1, 0.2) == parts
    assert split(texts, labels, ("no", "yes"), 0.1, 0.2, seed=1) != parts
    assert not split(texts, labels, ("no", "yes"), 0.1).validation


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["a", "b"], ["no"], "got 1 labels for 2 texts"),
        (["a"], ["maybe"], "unknown label 'maybe'; allowed: no, yes"),
        (["a", "A"], ["no", "yes"], "got 1 distinct texts; at least 10"),
        ([str(i) for i in range(50)], ["no"] * 50, "label 'yes' has 0 distinct texts"),
        ([str(i) for i in range(50)], ["no"] * 49 + ["yes"], "label 'yes' has 1 distinct"),
    ],
)
def test_split_rejects_bad_labels(texts, labels, message):
    with pytest.raises(DataError, match=message):
        split(texts, labels, ("no", "yes"), 0.1)
