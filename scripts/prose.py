#!/usr/bin/env python3
"""Report banned openers and phrases in code and Markdown: python scripts/prose.py [PATH ...].

The lists are in ``prose.toml``. Docstrings of modules, classes, functions and attributes may not
start with an opener; no line may contain a phrase.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).with_suffix(".toml")
DEFAULT_PATHS = ("cluster", "deployments", "scripts", "docs", "README.md", "CONTRIBUTING.md")
SUFFIXES = {".py", ".md", ".yml", ".yaml", ".html", ".toml", ".sh", ""}
_EXEMPT = {DATA.name, "chart.js", "check_texts.py"}  # a list, vendored code, sample texts


def find_problems(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Yield the line number and a description of each violation in one file."""
    lists = tomllib.loads(DATA.read_text(encoding="utf-8"))
    phrases = re.compile(rf"\b({'|'.join(lists['phrases'])})\b", re.IGNORECASE)
    for number, line in enumerate(text.splitlines(), 1):
        for match in phrases.finditer(line):
            yield number, f'banned phrase "{match[0]}"'
    if path.suffix == ".py":
        for number, docstring in docstrings(ast.parse(text)):
            opener = docstring.split(maxsplit=1)[:1]
            if opener and opener[0].rstrip(",:;") in lists["openers"]:
                yield number, f'docstring starts with "{opener[0]}"'


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line number and text of each docstring, attribute docstrings included."""
    for node in ast.walk(tree):
        for previous, statement in _with_previous(getattr(node, "body", None)):
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                continue
            follows_attribute = isinstance(previous, ast.Assign | ast.AnnAssign)
            if isinstance(statement.value.value, str) and (previous is None or follows_attribute):
                yield statement.lineno, statement.value.value.strip()


def _with_previous(body: object) -> Iterator[tuple[ast.stmt | None, ast.stmt]]:
    statements = body if isinstance(body, list) else []
    yield from zip([None, *statements], statements, strict=False)


def tracked_files(paths: list[str]) -> list[Path]:
    """Return the tracked and new text files under the paths, relative to the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *paths]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = {Path(name) for name in listed.stdout.splitlines()}
    return sorted(
        file
        for file in files
        if file.suffix in SUFFIXES
        and "vendor" not in file.parts
        and file.name not in _EXEMPT
        and (ROOT / file).is_file()
    )


def main(arguments: list[str]) -> int:
    """Print each violation as ``path:line: description``; return 1 if there is one."""
    num_problems = 0
    for file in tracked_files(arguments or list(DEFAULT_PATHS)):
        for number, problem in find_problems(file, (ROOT / file).read_text(encoding="utf-8")):
            num_problems += 1
            print(f"{file}:{number}: {problem}")
    return 1 if num_problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
