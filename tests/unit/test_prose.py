"""Detector of banned openers and phrases, on small inputs."""

from pathlib import Path

import pytest

import prose

PYTHON, MARKDOWN = Path("module.py"), Path("page.md")


def lines_with_problems(path: Path, text: str) -> list[int]:
    return [line for line, _ in prose.find_problems(path, text)]


def test_clean_text_has_no_problem() -> None:
    code = (
        '"""Queue of one pool."""\n\nLIMIT = 3\n"""Requests."""\n\ndef f():\n    """Send it."""\n'
    )
    assert lines_with_problems(PYTHON, code) == []
    assert lines_with_problems(MARKDOWN, "# Queue\n\nWhat a queue is: a list.\n") == []


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ('"""What a pool has."""\n', 1),
        ('class Pool:\n    """Those that wait."""\n', 2),
        ('def limit():\n    """How many there are."""\n', 2),
        ('class Pool:\n    async def limit(self):\n        """Whether it waits."""\n', 3),
        ('LIMIT = 3\n"""So many."""\n', 2),
        ('class Pool:\n    limit: int\n    """Which one."""\n', 3),
    ],
    ids=["module", "class", "function", "method", "constant", "attribute"],
)
def test_banned_openers_are_found_in_docstrings(code: str, line: int) -> None:
    assert lines_with_problems(PYTHON, code) == [line]


def test_openers_are_whole_words_and_followed_by_punctuation() -> None:
    assert lines_with_problems(PYTHON, '"""Sole queue."""\n') == []
    assert lines_with_problems(PYTHON, '"""So, a queue."""\n') == [1]


def test_strings_that_are_no_docstrings_may_start_with_an_opener() -> None:
    code = 'def f():\n    """Return a prompt."""\n    g()\n    "What is it?"\n    return "Who?"\n'
    assert lines_with_problems(PYTHON, code) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (PYTHON, "x = 1  # written %s\n"),
        (PYTHON, 'x = "written %s"\n'),
        (PYTHON, '"""Queue, written %s."""\n'),
        (MARKDOWN, "Text written %s here.\n"),
        (Path("script"), "echo written %s\n"),
    ],
    ids=["comment", "string", "docstring", "markdown", "shell"],
)
def test_banned_phrases_are_found_everywhere(path: Path, text: str) -> None:
    phrase = " ".join(("all", "through"))  # in two parts: this file must be clean, too
    assert lines_with_problems(path, text % phrase) == [1]
    assert lines_with_problems(path, text % phrase.upper()) == [1]
    assert lines_with_problems(path, text % f"{phrase}out") == []


def test_the_repository_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    found = prose.main([])
    assert found == 0, capsys.readouterr().out
