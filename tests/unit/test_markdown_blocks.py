"""Parts of Markdown that are translated, and those that are kept."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.applications.markdown import around_protected, blocks, protect, restore

CASES = {
    "front matter": ("---\ntitle: Hello\ntags: [a]\n---\n\n# Head\n", ["Head"]),
    "a rule at the start": ("---\n\nText\n\n---\n", ["Text"]),
    "nested items": (
        "- one\n    - two\n\n    more\n\n- three\n\t- four\n",
        ["one", "two", "more", "three", "four"],
    ),
    "code in an item": (
        "1. step\n\n    ```sh\n    make it\n    ```\n\n    prose\n",
        ["step", "prose"],
    ),
    "indented code": ("para\n\n    code line\n\n    more code\n\nend\n", ["para", "end"]),
    "an indented line of a paragraph": ("para\n    lazy\n", ["para\n    lazy"]),
    "a code span of three marks": (
        "```foo``` is code.\n\nAfter.\n",
        ["```foo``` is code.", "After."],
    ),
    "a fence in a fence": ("```\n```python\ncode\n```\nprose\n", ["prose"]),
    "a longer fence": ("````\n```\ncode\n```\n````\nprose\n", ["prose"]),
    "a quoted fence": ("> ```\n> code\n> ```\n> quote\n", ["quote"]),
    "a quoted fence without end": ("> ```\n> code\n\nprose\n", ["prose"]),
    "a comment": ("<!-- one\n\ntwo -->\ntext\n", ["text"]),
    "preformatted HTML": ("<pre>\ncode\n\nmore\n</pre>\ntext\n", ["text"]),
    "definitions": (
        'See [the docs][ref].[^1]\n\n[ref]: https://example.org/x "Title"\n[^1]: A note.\n',
        ["See [the docs][ref].[^1]", "A note."],
    ),
    "a table without outer marks": (
        "Name | Use\n--- | ---\ncat | pet\n\none | two\n",
        ["Name", "Use", "cat", "pet", "one | two"],
    ),
}


@pytest.mark.parametrize(("text", "translated"), CASES.values(), ids=CASES)
def test_structure_is_kept(text: str, translated: list[str]) -> None:
    segments = list(blocks(text))
    assert [segment.text for segment in segments if segment.translates] == translated
    assert "".join(segment.text for segment in segments) == text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('[a](../x.md "Title") b', ['(../x.md "Title")']),
        ("[a](https://example.org/Foo_(bar)).", ["(https://example.org/Foo_(bar))"]),
        ("[a][ref] and [b][] and [^note]", ["[ref]", "[]", "[^note]"]),
    ],
)
def test_targets_of_links_are_protected(text: str, kept: list[str]) -> None:
    masked, found = protect(text)
    assert found == kept
    assert restore(masked, found) == text
    assert restore("[[" + "9" * 5000 + "]]", found) is None


PIECES = st.sampled_from(
    [
        *(
            "```",
            "~~~",
            "`",
            "- ",
            "1. ",
            "> ",
            "# ",
            "|",
            "---",
            "    ",
            "\t",
            "\n",
            "\n\n",
            "\r\n",
        ),
        *("<!--", "-->", "<pre>", "</pre>", "[^1]: ", "[a]: b", "[a](b)", "](", "word", "é", " "),
    ]
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(PIECES, max_size=30).map("".join))
def test_parts_joined_are_the_text(text: str) -> None:
    assert "".join(segment.text for segment in blocks(text)) == text
    assert "".join(segment.text for segment in around_protected(text)) == text
    masked, kept = protect(text)
    assert not kept or restore(masked, kept) == text
