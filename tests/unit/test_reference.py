"""The reference pages that are generated when the documentation is built."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import BaseModel

import cluster.client
import reference
from cluster.config import TandemConfig
from cluster.metrics import table

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def render(name: str) -> str:
    page = SimpleNamespace(file=SimpleNamespace(src_uri=f"reference/{name}.md"))
    text = (REFERENCE / f"{name}.md").read_text(encoding="utf-8")
    return reference.on_page_markdown(text, page=page)


def test_every_metric_is_described_with_its_labels() -> None:
    page = render("metrics")
    for metric in table.all_metrics():
        (row,) = re.findall(rf"^\| `{metric.name}` \| .*$", page, flags=re.MULTILINE)
        assert metric.help in row
        assert all(f"`{label}`" in row for label in metric.labels)


def fields_below(model: type[BaseModel]) -> set[str]:
    nested = [
        section
        for field in model.model_fields.values()
        for section in reference.models_in(field.annotation)
    ]
    return set(model.model_fields).union(*map(fields_below, nested))


def test_every_field_of_the_configuration_is_listed() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", render("configuration"), flags=re.MULTILINE))
    assert listed == fields_below(TandemConfig)


def test_a_section_shows_the_defaults_that_its_parent_sets() -> None:
    page = render("configuration")
    assert "## `router.replicas`" in page
    assert re.search(
        r"^\| `max` \| integer.* \| `2` \|", page.split("## `router.replicas`")[1], re.M
    )


@pytest.mark.parametrize("command", ["up", "config show", "models finetune", "keys revoke"])
def test_each_command_has_a_section(command: str) -> None:
    assert f"\n## tandem {command}\n" in render("cli")


def test_the_clients_methods_and_results_are_described() -> None:
    page = render("client")
    for name in {*cluster.client.__all__} - {"Tandem"}:
        assert f"\n### {name}\n" in page
    assert "\n### chat\n" in page
    assert "Async form: `achat`." in page


def test_only_links_that_leave_the_docs_become_text() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="how-to/x.md"))
    text = "[in](../reference/cli.md) [out](../../ray-config.yaml) [web](https://ray.io)"
    kept = "[in](../reference/cli.md) out [web](https://ray.io)"
    assert reference.on_page_markdown(text, page=page) == kept
