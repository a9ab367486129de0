"""``tandem rollout``: starts rollouts, shows them, and requests actions."""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import typer

from cluster.cli.defaults import router_url
from cluster.cli.router_client import RouterClient, connect
from cluster.config.yaml_text import parse_yaml
from cluster.errors import ConfigError, RolloutError, UnavailableError
from cluster.models.checksum import weights_checksum
from cluster.models.store import resolve
from cluster.rollout import FINISHED

POLL_S = 2.0
OPTIONS = {"model": "--to", "canary": "--canary", "shadow": "--shadow"}
"""Options of the command by the field that they set."""
LOST_S = 300.0
"""Seconds without a report of a rollout after which ``--wait`` gives up; routers may be replaced
meanwhile."""
PATH = "/v1/rollouts"


def start(
    model: str, settings: dict[str, Any], url: str | None, key: str | None, *, wait: bool
) -> None:
    """Start a rollout; with ``wait``, follow it to its end.

    Raises:
        RolloutError: It was not promoted, or is paused.
    """
    to = settings["model"]
    if Path(to).expanduser().is_dir():
        settings["model"] = resolve(to)
        settings.setdefault("checksum", weights_checksum(to) or None)
    with connect(router_url(url), key) as client:
        body = {"action": "start", "settings": settings}
        version = client.post(f"{PATH}/{model}", body)["version"]
        typer.echo(f"rollout {version} of {model} to {settings['model']} has started")
        if wait:
            _follow(client, model, version)


def act(action: str, model: str | None, url: str | None, key: str | None) -> None:
    """Request an action; the model may be omitted if one rollout is in progress."""
    with connect(router_url(url), key) as client:
        if model is None:
            running = [r["model"] for r in _rollouts(client) if r["phase"] not in FINISHED]
            if len(running) != 1:
                names = ", ".join(running) or "none"
                raise ConfigError(f"name the model; rollouts in progress: {names}")
            model = running[0]
        client.post(f"{PATH}/{model}", {"action": action})
    typer.echo(f"{action} requested for the rollout of {model}")


def status(model: str | None, url: str | None, key: str | None, *, as_json: bool) -> None:
    """Print the last rollout of each model, or of one."""
    with connect(router_url(url), key) as client:
        found = [r for r in _rollouts(client) if model in (None, r["model"])]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    if not found:
        typer.echo("no rollouts")
    for rollout in found:
        _print(rollout)


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Return the fields of ``NAME=VALUE`` pairs."""
    settings = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: expected NAME=VALUE, such as min_requests=50")
        if name in OPTIONS:
            raise ConfigError(f"--set {pair}: use the option {OPTIONS[name]}")
        settings[name] = parse_yaml(text, f"--set {pair}")
    return settings


def parse_steps(text: str) -> list[float]:
    """Return the percentages of ``--canary``."""
    try:
        return [float(step) for step in text.split(",")]
    except ValueError:
        raise ConfigError(f"--canary {text}: expected percentages, such as 5,25,100") from None


def _follow(client: RouterClient, model: str, version: str) -> None:
    num_shown, seen_at = 0, time.monotonic()
    while True:
        try:
            rollouts = [r for r in _rollouts(client) if r["model"] == model]
        except UnavailableError:  # the routers are being replaced
            rollouts = []
        for rollout in rollouts:
            if rollout["version"] != version:
                continue
            seen_at = time.monotonic()
            for decision in rollout["decisions"][num_shown:]:
                typer.echo(_decision(decision))
            num_shown = len(rollout["decisions"])
            if _is_promoted(rollout):
                typer.echo(_advice(rollout))
                return
        if time.monotonic() - seen_at > LOST_S:
            raise RolloutError(f"rollout {version} of {model} is unknown since {LOST_S:g} s")
        time.sleep(POLL_S)


def _is_promoted(rollout: Mapping[str, Any]) -> bool:
    """Return False if it goes on; raise if it does not."""
    model, reason = rollout["model"], (rollout["decisions"] or [{"reason": ""}])[-1]["reason"]
    if rollout["phase"] == "rolled_back":
        raise RolloutError(f"{model} was rolled back: {reason}")
    if rollout["phase"] == "cancelled":
        raise RolloutError(
            f"the rollout of {model} was cancelled: a configuration without it was deployed"
        )
    if rollout["is_paused"]:
        raise RolloutError(
            f"the rollout of {model} is paused: {reason}; continue with "
            f"`tandem rollout resume {model}`, or end it with `tandem rollout abort {model}`"
        )
    return bool(rollout["phase"] == "promoted")


def _rollouts(client: RouterClient) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(PATH)["data"]
    return found


def _print(rollout: Mapping[str, Any]) -> None:
    phase = f"{rollout['phase']}{', paused' if rollout['is_paused'] else ''}"
    share = f"{rollout['share']:g} % of the sessions at {rollout['to']}"
    typer.echo(f"{rollout['model']}: rollout {rollout['version']} {phase}; {share}")
    for name in ("old", "new"):
        figures = rollout["window"][name]
        text = f"  {name}: {figures['finished']} answers, {figures['failed']} failed"
        if figures["compared"]:
            text += f", {figures['agreed']} of {figures['compared']} labels agree"
        typer.echo(text)
    for decision in rollout["decisions"]:
        typer.echo(f"  {_decision(decision)}")
    if rollout["phase"] == "promoted":
        typer.echo(_advice(rollout))


def _decision(decision: Mapping[str, Any]) -> str:
    at = datetime.fromtimestamp(decision["time"]).astimezone()
    return f"{at:%H:%M:%S} {decision['decision']}: {decision['reason']}"


def _advice(rollout: Mapping[str, Any]) -> str:
    return (
        f"Write into the configuration file of {rollout['model']}, before it is deployed again:\n"
        f"  model: {rollout['to']}\n  version: {rollout['version']}"
    )
