"""The table of classifiers' request fields in ``docs/reference/api.md`` follows the types."""

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct

import reference
from cluster.engines.classifier.serving.apis import TRANSLATIONS
from cluster.engines.classifier.serving.schema import TaskRequest
from cluster.engines.classifier.serving.tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "api.md"
COMMON = "all of the first group"


def fields_of(request: type[Struct], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each field's treatment and name; those of the object ``parameters`` one by one."""
    docs = reference.attribute_docs(request)
    types = typing.get_type_hints(request)
    for name in request.__struct_fields__:
        inner = [one for one in (types[name], *typing.get_args(types[name])) if is_struct(one)]
        text = docs.get(name, "")
        if name == "parameters" and inner:
            yield from fields_of(inner[0], "parameters.")
        elif text.startswith("No effect"):
            yield "ignored", prefix + name
        else:
            yield "rejected" if "must be null" in text.lower() else "supported", prefix + name


def is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct)


def expected() -> dict[str, set[tuple[str, str]]]:
    """Return the fields by the first column of the table."""
    common = set(fields_of(TaskRequest))
    rows = {COMMON: common}
    for task in {task for group in TASKS.values() for task in group if task.paths}:
        rows[paths(task.paths)] = set(fields_of(task.request)) - common
    for translation in TRANSLATIONS:
        key = f"{paths(translation.paths)} ({translation.api})"
        rows[key] = set(fields_of(translation.request))
    return rows


def paths(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def test_the_table_has_the_fields_of_every_path() -> None:
    section = PAGE.read_text(encoding="utf-8").split("### Classifiers\n")[1].split("\n## ")[0]
    found = {}
    for cells in re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", section, re.MULTILINE):
        treatments = zip(("supported", "ignored", "rejected"), cells[1:], strict=True)
        found[cells[0]] = {
            (treatment, name)
            for treatment, cell in treatments
            for name in re.findall(r"`([\w.]+)`", cell)
        }
    rows = expected()
    assert {key: found[key] for key in found if key in rows} == rows
