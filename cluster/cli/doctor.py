"""``tandem doctor``."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from cluster.cli.defaults import load_config
from cluster.launch import state
from cluster.launch.doctor import Finding, Level, run_checks
from cluster.models.store import home

_STYLES: dict[Level, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def run(config: Path | None, overrides: Sequence[str], *, as_json: bool) -> None:
    """Print the findings of all checks; exit with code 1 if one failed.

    Raises:
        ConfigError: the configuration is invalid.
    """
    # By default, check the configuration of the running cluster.
    known = None if config or overrides else state.load(home())
    if known is not None and Path(known.config_path).is_file():
        config, overrides = Path(known.config_path), known.overrides
    loaded = load_config(config, overrides, address=known.address if known else None)
    console = Console(soft_wrap=True, highlight=False)
    findings: list[Finding] = []
    for finding in run_checks(loaded, home()):
        findings.append(finding)
        if not as_json:
            console.print(_format(finding))
    failed = [finding for finding in findings if finding.level == "fail"]
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    elif not failed:
        console.print("No problems found.")
    if failed:
        raise typer.Exit(1)


def _format(finding: Finding) -> Text:
    text = Text.assemble((f"{finding.level:<5}", _STYLES[finding.level]))
    text.append(f"{finding.check}: {finding.message}")
    if finding.advice:
        text.append(f"\n     → {finding.advice}", style="bold")
    return text
