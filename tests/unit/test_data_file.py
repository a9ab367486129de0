"""Files of texts and labels, as people have them."""

import pytest

from cluster.errors import DataError
from cluster.models.data_file import read_rows


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def pairs(path, **options):
    return [(row.text, row.label) for row in read_rows(path, **options)]


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
    ("a.csv", "text,label,text\na,b,c\n", ":1: 2 columns 'text'; rename or remove all but one"),
    ("a.jsonl", '{"text": "a", "label": "b", "label": "c"}', ":1: not valid JSON: two fields"),
    ("a.jsonl", '{"text": "a", "label": NaN}', ":1: label: expected a string, got NaN"),
    ("a.csv", "text|class\na|b\n", ":1: no column 'label'; columns: 'text', 'class'"),
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


EXCEL = [
    ("a.csv", "text;label\na, b;yes\nc;no\n", None),
    ("a.csv", "\ufeffid;text;label;\r\n1;a, b;yes;\r\n2;c;no;\r\n;;;\r\n", None),
    ("a.csv", "sep=;\r\ntext;label\r\na, b;yes\r\nc;no\r\n", None),
    ("a.csv", "text|label\na, b|yes\nc|no\n", None),
    ("a.csv", "text\tlabel\na, b\tyes\nc\tno\n", None),
    ("a.tsv", 'text,label\n"a, b",yes\nc,no\n', None),
    ("a.csv", 'text, label\n"a, b",yes\nc,no\n', None),
    ("a.tsv", "text\tlabel\r\na, b\tyes\r\nc\tno\r\n".encode("utf-16"), None),
    ("a.csv", "\ufefftext;label\na, b;yes\nc;no\n", "utf-8"),
    ("a.csv", "text;label\na, b;yes\nc;no\n".encode("utf-16-le"), "utf-16-le"),
]


@pytest.mark.parametrize(("name", "text", "encoding"), EXCEL)
def test_delimiter_and_unicode_encoding_are_detected(tmp_path, name, text, encoding):
    path = write(tmp_path, name, text)
    assert pairs(path, encoding=encoding) == [("a, b", "yes"), ("c", "no")]


def test_lines_are_counted_from_the_separator_line_of_excel(tmp_path):
    path = write(tmp_path, "a.csv", "sep=;\ntext;label\na;b\nc\n")
    with pytest.raises(DataError, match=":4: got 1 cells"):
        read_rows(path)


def test_another_encoding_can_be_set(tmp_path):
    path = write(tmp_path, "a.csv", "text;label\nschön;gut\n".encode("cp1252"))
    assert pairs(path, encoding="cp1252") == [("schön", "gut")]
    with pytest.raises(DataError, match=":2: not valid UTF-8; set the file's --encoding"):
        read_rows(path)
    for name in ("latin-15-x", "base64"):
        with pytest.raises(DataError, match=f"unknown encoding '{name}'; examples: utf-8"):
            read_rows(path, encoding=name)


@pytest.mark.parametrize(
    ("found", "read"),
    [
        (["1.0", "0.0", "-2.0"], ["1", "0", "-2"]),
        (["1", "1.0", "0"], ["1", "1", "0"]),
        (["1.0", "1.5", "2.0"], ["1.0", "1.5", "2.0"]),
        (["1.0", "yes"], ["1.0", "yes"]),
    ],
)
def test_integer_labels_of_pandas_are_read_as_integers(tmp_path, found, read):
    csv = write(tmp_path, "a.csv", "text,label\n" + "".join(f"t,{label}\n" for label in found))
    assert [row.label for row in read_rows(csv)] == read
    if "yes" not in found:
        lines = "".join(f'{{"text": "t", "label": {label}}}\n' for label in found)
        assert [row.label for row in read_rows(write(tmp_path, "a.jsonl", lines))] == read


def test_up_to_ten_bad_lines_are_reported_together(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\na\n,b\nc,\nd,e\n"f"g,h\n')
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).splitlines() == [
        f"{path}: 4 bad lines:",
        f"  {path}:2: got 1 cells; expected 2",
        f"  {path}:3: text is empty",
        f"  {path}:4: label is empty",
        f"  {path}:6: not valid CSV: ',' expected after '\"'",
    ]
    for name, text in [
        ("b.csv", b"text,label\n" + b"\xff,b\n" * 20),
        ("b.jsonl", b'{"text": 1}\n' * 20),
    ]:
        with pytest.raises(DataError, match="10 or more bad lines") as caught:
            read_rows(write(tmp_path, name, text))
        assert len(str(caught.value).splitlines()) == 11
