"""Structure of text and Markdown files, and their division into passages."""

import re

from hypothesis import given
from hypothesis import strategies as st

from cluster.applications.knowledge.passages import Tokens, divide_document
from cluster.applications.knowledge.readers.text import read_markdown, read_text

PAGE = """Title
=====

First paragraph
of two lines.

## Install ##

```sh
# no heading

make
```

- one
- two

Part
----
Last.
"""


def tokens_of(text: str) -> Tokens:
    return Tokens([found.start() for found in re.finditer(r"\w+|[^\w\s]", text)])


def test_headings_and_blocks_of_markdown() -> None:
    document = read_markdown(PAGE)
    found = [(PAGE[b.start : b.end], b.heading, b.level) for b in document.blocks]
    assert found == [
        ("Title\n=====", ("Title",), 1),
        ("First paragraph\nof two lines.", ("Title",), 0),
        ("## Install ##", ("Title", "Install"), 2),
        ("```sh\n# no heading\n\nmake\n```", ("Title", "Install"), 0),
        ("- one\n- two", ("Title", "Install"), 0),
        ("Part\n----", ("Title", "Part"), 2),
        ("Last.", ("Title", "Part"), 0),
    ]


def test_a_rule_and_an_open_fence_are_no_headings() -> None:
    text = "One\n\n---\n\n| a |\n| - |\n\n```\n# code"
    assert [block.level for block in read_markdown(text).blocks] == [0, 0, 0, 0]


def test_passages_have_whole_blocks_of_one_section() -> None:
    document = read_markdown(PAGE)
    chunks = divide_document(document, tokens_of(PAGE), 100)
    assert [PAGE[chunk.start : chunk.end].split()[0] for chunk in chunks] == ["Title", "##", "Part"]
    assert [chunk.heading for chunk in chunks] == [
        ("Title",),
        ("Title", "Install"),
        ("Title", "Part"),
    ]
    assert [chunk.context for chunk in chunks] == [(), ("Title",), ("Title",)]


def test_a_heading_without_text_belongs_to_the_section_below_it() -> None:
    text = "# A\n\n## B\n\nText of B.\n\n# C\n"
    chunks = divide_document(read_markdown(text), tokens_of(text), 50)
    assert [text[c.start : c.end] for c in chunks] == ["# A\n\n## B\n\nText of B.", "# C"]
    assert chunks[0].heading == ("A", "B")


def test_a_long_paragraph_is_divided_between_sentences() -> None:
    text = "This is one sentence of eight tokens. " * 20
    chunks = divide_document(read_text(text), tokens_of(text), 40)
    assert all(text[chunk.start : chunk.end].endswith(".") for chunk in chunks)
    assert len(chunks) == 4 or len(chunks) == 5


TEXTS = st.text(st.sampled_from("ab#=-`~ .\n|>\t𝔘é"), max_size=300)


@given(TEXTS, st.integers(1, 20), st.booleans())
def test_passages_cover_all_words_in_order(text: str, max_tokens: int, is_markdown: bool) -> None:
    document = read_markdown(text) if is_markdown else read_text(text)
    tokens = tokens_of(text)
    chunks = divide_document(document, tokens, max_tokens)
    position = 0
    for chunk in chunks:
        assert not text[position : chunk.start].strip()
        assert text[chunk.start : chunk.end].strip()
        assert tokens.count(chunk.start, chunk.end) <= max_tokens
        position = chunk.end
    assert not text[position:].strip()


def test_reading_is_linear() -> None:
    for text in ("#" * 200_000, "`" * 200_000, "a\n=\n" * 50_000, "\n" * 200_000, "> " * 100_000):
        document = read_markdown(text)
        assert len(divide_document(document, tokens_of(text), 100)) < 200_001
