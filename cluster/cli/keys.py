"""``tandem keys``: the key file, changed one line at a time; a running router takes it up."""

import json
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from cluster.admission.keys import KeyFileContents, TenantEntry, digest, new_key, parse_keys
from cluster.cli.paths import load_config
from cluster.config.file import key_file_path
from cluster.errors import ConfigError
from cluster.key_file import read_keys, write_keys


@dataclass(frozen=True, slots=True)
class NewKey:
    """What ``tandem keys add`` was told."""

    tenant: str
    priority: int
    models: list[str] | None
    changes: dict[str, float | int | None]
    """Of the tenant, by field; None: as it is."""


def path_of(file: Path | None, config: Path | None) -> Path:
    """The key file: the one that is named, else the configuration's."""
    return file or key_file_path(load_config(config, []).config.router)


def add(path: Path, wanted: NewKey) -> None:
    """Make a key and print it, once."""
    key = new_key()
    contents = _read(path).model_dump(mode="json")
    tenant = contents["tenants"].setdefault(wanted.tenant, {})
    tenant |= {name: value for name, value in wanted.changes.items() if value is not None}
    contents["keys"].append(
        {
            "sha256": digest(key),
            "tenant": wanted.tenant,
            "priority": wanted.priority,
            "models": wanted.models or None,
        }
    )
    write_keys(path, parse_keys(json.dumps(contents), "the new key"))
    typer.echo(key)
    typer.echo(f"added to {path}; it is not shown again", err=True)


def show(path: Path, *, as_json: bool) -> None:
    """List the keys and what they may."""
    contents = _read(path)
    rows = [
        {
            "id": key.id,
            "tenant": key.tenant,
            "priority": key.priority,
            "models": None if key.models is None else list(key.models),
            **contents.tenants.get(key.tenant, TenantEntry()).model_dump(),
        }
        for key in contents.keys
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif not rows:
        typer.echo(f"no keys in {path}")
    else:
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*("–" if value is None else _text(value) for value in row.values()))
        Console().print(table)


def revoke(path: Path, key_id: str) -> None:
    """Take a key out, by the beginning of its id or by the key itself.

    Raises:
        ConfigError: no key, or more than one, is meant.
    """
    contents = _read(path)
    whole = digest(key_id)
    meant = [k for k in contents.keys if k.sha256 == whole or k.sha256.startswith(key_id)]
    if not key_id or len(meant) != 1:
        known = ", ".join(key.id for key in contents.keys) or "none"
        found = "no key has" if not meant else f"{len(meant)} keys have"
        raise ConfigError(f"{found} the id {key_id!r} in {path}; keys: {known}")
    left = tuple(key for key in contents.keys if key != meant[0])
    write_keys(path, KeyFileContents(tenants=contents.tenants, keys=left))
    typer.echo(f"revoked {meant[0].id} of {meant[0].tenant}")


def _read(path: Path) -> KeyFileContents:
    return read_keys(path) or KeyFileContents()


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
