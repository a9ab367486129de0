"""``tandem keys``: changes to the key file, which running routers pick up."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from cluster.admission.keys import KeyFileContents, TenantEntry, digest, new_key, parse_keys
from cluster.cli.defaults import load_config
from cluster.config.file import KEY_FILE, key_file_path
from cluster.errors import ConfigError
from cluster.key_file import lock_keys, read_keys, write_keys
from cluster.launch.shared_keys import is_key_file_of, prepare, publish_keys
from cluster.models.store import home

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


@dataclass(frozen=True, slots=True)
class NewKey:
    """Rights of a key that is created."""

    tenant: str
    priority: int
    models: list[str] | None
    """Models that it may use; None: all."""
    guards: list[str] | None
    """Guards that check its requests; None: those of the tenant."""
    cost_per_day: float | None = None
    """Budget of the key alone, in the configured currency."""
    cost_per_month: float | None = None


def add(path: Path, new: NewKey, limits: Mapping[str, float | int | None]) -> None:
    """Create a key and print it; the tenant keeps the limits that are None."""
    key, tenant = new_key(), new.tenant
    entry = {"sha256": digest(key), **asdict(new)}
    with lock_keys(path):
        contents = _read(path).model_dump(mode="json")
        limits_of_tenant = contents["tenants"].setdefault(tenant, {})
        limits_of_tenant |= {name: value for name, value in limits.items() if value is not None}
        contents["keys"].append(entry)
        write_keys(path, parse_keys(json.dumps(contents), "the new key"))
    typer.echo(key)
    typer.echo(f"Added to {path}. The key cannot be shown again.", err=True)


def show(path: Path, *, as_json: bool) -> None:
    contents = _read(path)
    rows = [
        {
            "id": key.id,
            "tenant": key.tenant,
            "priority": key.priority,
            "models": _listed(key.models),
            **(tenant := contents.tenants.get(key.tenant, TenantEntry())).model_dump(
                exclude={"soft_share"}
            ),
            "guards": _listed(tenant.guards if key.guards is None else key.guards),
            "key_cost_per_day": key.cost_per_day,
            "key_cost_per_month": key.cost_per_month,
        }
        for key in contents.keys
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif not rows:
        typer.echo(f"no keys in {path}")
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
    sha256 = digest(key_id)
    with lock_keys(path):
        contents = _read(path)
        matches = [k for k in contents.keys if k.sha256 == sha256 or k.sha256.startswith(key_id)]
        if not key_id or len(matches) != 1:
            known = ", ".join(key.id for key in contents.keys) or "none"
            found = "no key matches" if not matches else f"{len(matches)} keys match"
            raise ConfigError(f"{found} the id {key_id!r} in {path}; keys: {known}")
        remaining = tuple(key for key in contents.keys if key != matches[0])
        write_keys(path, KeyFileContents(tenants=contents.tenants, keys=remaining))
    typer.echo(f"revoked key {matches[0].id} of tenant {matches[0].tenant}")


def publish(path: Path) -> bool:
    """Let all nodes of the running cluster use the key file if it is the one of this Tandem home.

    Returns False if the cluster takes no keys from this file.
    """
    is_published = publish_keys(home(), path)
    if is_published:
        typer.echo(f"All nodes use the keys of {path} within a few seconds.", err=True)
    return is_published


def _listed(names: tuple[str, ...] | None) -> list[str] | None:
    return None if names is None else list(names)


def _read(path: Path) -> KeyFileContents:
    return read_keys(path) or KeyFileContents()


def _format(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
