"""Commands, metrics and links in the documentation exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cluster.cli.app import app
from cluster.config import file as config_file
from cluster.errors import ConfigError
from cluster.metrics import table
from tests.monitoring.promql import known_series, metric_names
from tests.monitoring.test_rules import promtool, rules

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNBOOKS = sorted((ROOT / "docs" / "runbooks").glob("*.md"))
_BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```|((?:^    .*\n)+)", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`]+)`")
_COMMAND = re.compile(r"(?:^|[\s(|/;])tandem ([a-z](?:[^\n#;)>&|\\]|\\\|)*)")
_METRIC = re.compile(r"(?<![\w:/.])(?:tandem_|ray_serve_|ray_vllm_|ray_node_|model:tandem_)[\w:]+")
_QUERY = re.compile(r"--data-urlencode 'query=([^']*)'|`((?:[a-z_]+ by \([^)]*\) |rate)\(?[^`]*)`")
NOT_METRICS = {
    "tandem_requests_PID_REPLICA",  # the file name of the request log
    *(metric.deprecated_name for metric in table.all_metrics()),
}
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
USAGE_ERROR: Any = typer.BadParameter.__base__
RECORDED = {rule["record"] for rule in rules() if "record" in rule}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the words after ``tandem``, and whether they are a complete command."""
    for block in _BLOCK.finditer(text):
        lines = (block[1] or block[2]).replace("\\\n", " ")
        yield from ((found[1], True) for found in _COMMAND.finditer(lines))
    for inline in _INLINE.finditer(_BLOCK.sub("", text)):
        for found in _COMMAND.finditer(" ".join(inline[1].split())):
            *before, last = found[1].split()
            for word in last.split("\\|"):
                yield " ".join([*before, word]), False


def check(words: str, *, whole: bool) -> None:
    """Parse a command as the command line does, without running it."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("tandem", shlex.split(words))
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        try:
            context = command.make_context(name, rest, parent=context)
        except typer.BadParameter as error:
            if whole or type(error).__name__ != "MissingParameter":
                raise
            return
    if overrides := context.params.get("overrides"):
        config_file.load(ROOT / "ray-config.yaml", overrides)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_command_exists(path: Path) -> None:
    for words, whole in commands(text_of(path)):
        check(words, whole=whole)


def test_commands_are_found_and_wrong_ones_are_rejected() -> None:
    found = [words for path in DOCUMENTS for words, _ in commands(text_of(path))]
    names_found = {words.split()[0] for words in found}
    assert names_found >= {"up", "down", "status", "top", "doctor", "logs"}
    for wrong in ("stats", "logs --requests ID", "models bake", "up --set router.max=1"):
        with pytest.raises((USAGE_ERROR, ConfigError)):
            check(wrong, whole=True)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_metric_exists(path: Path) -> None:
    series = known_series() | RECORDED
    families = series | {re.sub(r"_(bucket|sum|count)$", "", name) for name in series}
    mentioned = set(_METRIC.findall(text_of(path))) - NOT_METRICS
    wrong = {name for name in mentioned if name not in families and not is_prefix(name, series)}
    assert not wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_relative_link_leads_to_a_file(path: Path) -> None:
    assert not [link for link in _LINK.findall(text_of(path)) if not (path.parent / link).exists()]


def is_prefix(name: str, series: set[str]) -> bool:
    return name.endswith("_") and any(one.startswith(name) for one in series)


def test_every_query_of_a_runbook_is_valid(tmp_path: Path) -> None:
    queries = [
        " ".join((found[1] or found[2]).split())
        for path in RUNBOOKS
        for found in _QUERY.finditer(text_of(path))
    ]
    assert len(queries) > len(RUNBOOKS)
    for query in queries:
        assert metric_names(query) <= known_series() | RECORDED, query
    lines = [f"      - record: of:runbook\n        expr: {query!r}" for query in queries]
    file = tmp_path / "queries.yml"
    file.write_text("groups:\n  - name: runbooks\n    rules:\n" + "\n".join(lines))
    promtool("check", "rules", file)
