"""``tandem doctor``."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from cluster.cli.paths import load_config
from cluster.config.file import LoadedConfig
from cluster.launch import state
from cluster.launch.doctor import Finding, Level, examine
from cluster.models.store import home

_STYLES: dict[Level, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def run(config: Path | None, overrides: Sequence[str], *, as_json: bool) -> None:
    """Print what the checks find; exit code 1 where one failed.

    Raises:
        ConfigError: the configuration is wrong.
    """
    loaded = _load(config, overrides)
    console = Console(soft_wrap=True, highlight=False)
    findings: list[Finding] = []
    for finding in examine(loaded, home()):
        findings.append(finding)
        if not as_json:
            console.print(_line(finding))
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    elif not any(finding.level == "fail" for finding in findings):
        console.print("nothing stands in the way")
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(1)


def _load(config: Path | None, overrides: Sequence[str]) -> LoadedConfig:
    """What was named, else what the running cluster was started with, else the default."""
    known = None if config or overrides else state.load(home())
    if known is not None and Path(known.config_path).is_file():
        return load_config(Path(known.config_path), known.overrides)
    return load_config(config, overrides)


def _line(finding: Finding) -> Text:
    line = Text.assemble((f"{finding.level:<5}", _STYLES[finding.level]))
    line.append(f"{finding.check}: {finding.message}")
    if finding.advice:
        line.append(f"\n     → {finding.advice}", style="bold")
    return line
