"""``tandem keys``: changes to the key file, here or through a router of the cluster."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table

from cluster.admission.keys import ID_CHARS, digest
from cluster.cli.defaults import load_config
from cluster.cli.router_client import connect
from cluster.config.file import KEY_FILE, key_file_path
from cluster.errors import ConfigError
from cluster.key_file import NewKey, add_key, list_keys, revoke_key
from cluster.launch.shared_keys import is_key_file_of, prepare, publish_keys
from cluster.models.store import home
from cluster.operator_api import KEYS_PATH

_TITLES = {
    "requests_per_minute": "requests/min",
    "tokens_per_minute": "tokens/min",
    "max_concurrent": "concurrent",
    "tokens_per_day": "tokens/day",
    "cost_per_day": "cost/day",
    "cost_per_month": "cost/month",
    "key_cost_per_day": "key/day",
    "key_cost_per_month": "key/month",
}
_BUDGET_FIELDS = ("cost_per_day", "cost_per_month", "key_cost_per_day", "key_cost_per_month")


def key_file(file: Path | None, config: Path | None) -> Path:
    """Return the key file to change or list.

    Raises:
        ConfigError: this node joined a cluster, and the file is not another than its own.
    """
    if file is not None and not is_key_file_of(home(), file):
        return file
    prepare(home())  # loading the configuration may import Ray
    return home() / KEY_FILE if file else key_file_path(load_config(config, []).config.router)


def add(path: Path, new: NewKey, limits: Mapping[str, float | int | None]) -> None:
    """Create a key and print it; the tenant keeps the limits that are None."""
    _print_key(add_key(path, new, limits), f"Added to {path}.")


def add_remote(
    router: str, api_key: str | None, new: NewKey, limits: Mapping[str, float | int | None]
) -> None:
    """Create a key of a cluster on other machines, and print it."""
    body = {**asdict(new), "limits": {k: v for k, v in limits.items() if v is not None}}
    with connect(router, api_key) as client:
        _print_key(client.post(KEYS_PATH, body)["key"], f"Added to the cluster of {router}.")


def _print_key(key: str, text: str) -> None:
    typer.echo(key)
    typer.echo(f"{text} The key cannot be shown again.", err=True)


def show(path: Path, *, as_json: bool) -> None:
    _show(list_keys(path), str(path), as_json=as_json)


def show_remote(router: str, api_key: str | None, *, as_json: bool) -> None:
    """List the keys of a cluster on other machines."""
    with connect(router, api_key) as client:
        _show(client.get(KEYS_PATH)["data"], router, as_json=as_json)


def _show(rows: list[dict[str, Any]], where: str, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif not rows:
        typer.echo(f"no keys in {where}")
    else:
        table = Table(box=None)
        always = [field for field in rows[0] if field not in _BUDGET_FIELDS]
        used = [field for field in _BUDGET_FIELDS if any(row[field] is not None for row in rows)]
        for field in (*always, *used):
            table.add_column(_TITLES.get(field, field), no_wrap=field == "id")
        for row in rows:
            values = (row[field] for field in (*always, *used))
            table.add_row(*("–" if value is None else _format(value) for value in values))
        Console().print(table)


def revoke(path: Path, key_id: str) -> None:
    """Delete a key, given by a prefix of its id or by the key itself.

    Raises:
        ConfigError: no key, or more than one, matches.
    """
    _print_revoked(*revoke_key(path, key_id))


def revoke_remote(router: str, api_key: str | None, key_id: str) -> None:
    """Delete a key of a cluster on other machines; a key itself is never sent.

    Raises:
        ConfigError: no key, or more than one, matches.
    """
    with connect(router, api_key) as client:
        ids = [row["id"] for row in client.get(KEYS_PATH)["data"]]
        found = client.delete(f"{KEYS_PATH}/{quote(_resolve(ids, key_id), safe='')}")
    _print_revoked(found["id"], found["tenant"])


def _resolve(ids: list[str], key_id: str) -> str:
    """Return the id of a key that is given by a prefix of it, the key or its digest."""
    if key_id[:ID_CHARS] in ids:
        return key_id
    own = digest(key_id)[:ID_CHARS]
    matches = [each for each in ids if each == own or each.startswith(key_id)]
    if not key_id or len(matches) != 1:
        found = "no key matches" if not matches else f"{len(matches)} keys match"
        raise ConfigError(f"{found} the id {key_id!r}; keys: {', '.join(ids) or 'none'}")
    return matches[0]


def _print_revoked(key_id: str, tenant: str) -> None:
    typer.echo(f"revoked key {key_id} of tenant {tenant}")


def publish(path: Path) -> bool:
    """Let all nodes of the running cluster use the key file if it is the one of this Tandem home.

    Returns False if the cluster takes no keys from this file.
    """
    is_published = publish_keys(home(), path)
    if is_published:
        typer.echo(f"All nodes use the keys of {path} within a few seconds.", err=True)
    return is_published


def _format(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
