"""``tandem doctor``."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from cluster.cli.defaults import load_config
from cluster.config.file import LoadedConfig
from cluster.launch import state
from cluster.launch.doctor import Finding, Level, run_checks
from cluster.models.store import home

_STYLES: dict[Level, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def run(config: Path | None, overrides: Sequence[str], *, as_json: bool) -> None:
    """Print the findings of all checks; exit with code 1 if one failed.

    Raises:
        ConfigError: the configuration is invalid.
    """
    loaded = _load(config, overrides)
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


def _load(config: Path | None, overrides: Sequence[str]) -> LoadedConfig:
    """Load the given configuration, or that of the running cluster, or the default."""
    known = None if config or overrides else state.load(home())
    if known is not None and Path(known.config_path).is_file():
        return load_config(Path(known.config_path), known.overrides)
    return load_config(config, overrides)


def _format(finding: Finding) -> Text:
    text = Text.assemble((f"{finding.level:<5}", _STYLES[finding.level]))
    text.append(f"{finding.check}: {finding.message}")
    if finding.advice:
        text.append(f"\n     → {finding.advice}", style="bold")
    return text
