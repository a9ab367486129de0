import numpy as np
import pytest

from cluster.errors import DataError
from cluster.models.finetune_data import label_ids, label_names, read_rows, split


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'text,label\ngood,yes\n\n"bad, ""very""\nbad",no\n'),
        ("a.csv", '\ufefflabel,id,text\r\nyes,1,good\r\n\r\nno,2,"bad, ""very""\nbad"\r\n'),
        ("a.tsv", 'text\tlabel\ngood\tyes\n\n"bad, ""very""\nbad"\tno\n'),
        ("a.jsonl", '\n{"text": "good", "label": "yes"}\n\n'
         '{"label": "no", "text": "bad, \\"very\\"\\nbad", "more": [1]}'),
    ],
)  # fmt: skip
def test_formats_give_the_same_rows(tmp_path, name, text):
    rows = read_rows(write(tmp_path, name, text))
    assert [(row.text, row.label) for row in rows] == [("good", "yes"), ('bad, "very"\nbad', "no")]
    assert [row.line for row in rows] == [2, 4]


def test_columns_are_selectable_and_labels_may_be_numbers_or_booleans(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"t": "x", "l": 3}\n{"t": "y", "l": true}')
    assert [row.label for row in read_rows(path, "t", "l")] == ["3", "true"]
    assert [row.label for row in read_rows(path, "t", None)] == ["", ""]


BAD = [
    ("a.txt", "text,label\n", "extension must be one of .csv, .tsv, .jsonl"),
    ("a.csv", "text,class\na,b\n", ":1: no column 'label'; columns: 'text', 'class'"),
    ("a.csv", "text,label\na,b\nc\n", ":3: got 1 cells; expected 2"),
    ("a.csv", "text,label\na,b\nc,d,e\n", ":3: got 3 cells; expected 2"),
    ("a.csv", 'text,label\na,b\n\n"c\n,d\n', ":4: not valid CSV: unexpected end of data"),
    ("a.csv", 'text,label\n"a"x,b\n', ":2: not valid CSV"),
    ("a.csv", "text,label\na,b\n  ,b\n", ":3: text is empty"),
    ("a.csv", "text,label\na,b\nc,\n", ":3: label is empty"),
    ("a.csv", b"text,label\na,b\n\xff,b\n", ":3: not valid UTF-8"),
    ("a.csv", "text,label\n" + "a" * 200_000 + ",b\n", ":2: not valid CSV: field larger"),
    ("a.jsonl", '{"text": "a", "label": "b"}\n{"text": "a"\n', ":2: not valid JSON"),
    ("a.jsonl", '{"text": "a", "label": "b"}\n["a"]\n', ":2: expected an object, got '[\"a\"]'"),
    ("a.jsonl", '{"text": "a"}\n', ":1: no column 'label'; columns: 'text'"),
    ("a.jsonl", '{"text": null, "label": "b"}\n', ":1: text: expected a string, got null"),
    ("a.jsonl", '{"text": "\\ud800", "label": "b"}\n', ":1: text contains a lone surrogate"),
    ("a.jsonl", "[" * 100_000, ":1: not valid JSON"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_errors_name_file_and_line(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_rows(tmp_path / "none.csv")


def test_labels_have_a_fixed_order(tmp_path):
    def names(*labels):
        text = "text,label\n" + "".join(f"t,{label}\n" for label in labels)
        path = write(tmp_path, "a.csv", text)
        return label_names(path, read_rows(path))

    assert names("yes", "no", "yes") == ("no", "yes")
    assert names("10", "9", "0") == ("0", "9", "10")
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
