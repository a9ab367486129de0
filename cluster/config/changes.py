"""Differences between two configurations, and the processes that each change restarts.

A deployment's version covers its settings that only a restart can change, so Ray Serve replaces its
replicas if one of these changes, and reconfigures the running ones otherwise.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

from pydantic_core import to_jsonable_python

from cluster.config.application import ServedPool, TandemConfig
from cluster.config.applications import APPLICATIONS
from cluster.config.operations import OperationsConfig
from cluster.config.section import Section

CLUSTER = "cluster"
"""Section that only a new start of the local cluster applies."""


class Setting(NamedTuple):
    """One field of a configuration."""

    path: str
    value: Any
    restart_value: Any
    """Part of the value that only a restart can change; None if all of it changes live."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Effect of deploying another configuration, by the paths of changed fields."""

    live: tuple[str, ...]
    """Fields that running replicas take over."""
    restarts: Mapping[str, tuple[str, ...]]
    """Deployments whose replicas are replaced, and why."""
    cluster: tuple[str, ...]
    """Fields that need a new start of the local cluster."""
    added: tuple[str, ...]
    """New deployments."""
    removed: tuple[str, ...]
    """Deployments that end."""

    @property
    def is_empty(self) -> bool:
        return not (self.live or self.restarts or self.cluster or self.added or self.removed)


def settings(section: Section, path: str = "", *, restarts: bool = False) -> Iterator[Setting]:
    """Yield all fields of a section and of those below it."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        restart_value = value if restarts else section.restart_value(name)
        if isinstance(value, Section):
            below = restarts or restart_value is not None
            yield from settings(value, f"{path}{name}.", restarts=below)
        else:
            yield Setting(f"{path}{name}", value, restart_value)


def pool_version(pool: ServedPool, operations: OperationsConfig) -> str:
    """Return a digest of what only a restart of a pool's replicas can change."""
    return _digest(_pool_settings(pool, operations))


def router_version(config: TandemConfig) -> str:
    """Return a digest of what only a restart of the routers can change."""
    return _digest(_router_settings(config))


def compare(old: TandemConfig, new: TandemConfig) -> Changes:
    """Return the effect of deploying ``new`` in place of ``old``."""
    before, after = _by_deployment(old), _by_deployment(new)
    restarts = {
        name: reasons
        for name in sorted(before.keys() & after.keys())
        if (reasons := _differences(before[name], after[name], "restart_value"))
    }
    pools = {pool.name for pool in old.pools} & {pool.name for pool in new.pools}
    changed = set(_differences(_all_settings(old, pools), _all_settings(new, pools), "value"))
    cluster = {path for path in changed if path.startswith(f"{CLUSTER}.")}
    restarting = {path for reasons in restarts.values() for path in reasons}
    return Changes(
        live=tuple(sorted(changed - cluster - restarting)),
        restarts=restarts,
        cluster=tuple(sorted(cluster)),
        added=tuple(sorted(after.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - after.keys())),
    )


def _pool_settings(pool: ServedPool, operations: OperationsConfig) -> list[Setting]:
    return [*settings(pool, _path(pool)), *settings(operations)]


def _path(pool: ServedPool) -> str:
    """Return the path of a pool's settings, with a dot at the end."""
    path = f"{pool.kind}s"
    return f"{path}." if path == APPLICATIONS else f"{path}.{pool.name}."


def _router_settings(config: TandemConfig) -> list[Setting]:
    pools = [pool.deployment for _, pool in config.served_pools]
    tracing = (each for each in settings(config.operations) if each.path.startswith("tracing"))
    router = settings(config.router, "router.")
    return [Setting("names of the pools", None, sorted(pools)), *router, *tracing]


def _by_deployment(config: TandemConfig) -> dict[str, list[Setting]]:
    pools = {
        pool.deployment: _pool_settings(pool, config.operations) for _, pool in config.served_pools
    }
    return {config.router.deployment: _router_settings(config), **pools}


def _all_settings(config: TandemConfig, pools: Collection[str]) -> list[Setting]:
    found = [each for each in settings(config) if each.path not in ("generators", "classifiers")]
    for pool in config.pools:
        if pool.name in pools:
            found += settings(pool, _path(pool))
    return found


def _differences(
    before: Iterable[Setting], after: Iterable[Setting], part: Literal["value", "restart_value"]
) -> tuple[str, ...]:
    """Return the paths of the settings whose part differs."""
    old, new = ({each.path: getattr(each, part) for each in side} for side in (before, after))
    return tuple(path for path in sorted({*old, *new}) if old.get(path) != new.get(path))


def _digest(all_settings: Iterable[Setting]) -> str:
    values = {each.path: each.restart_value for each in all_settings}
    # Replicas of another release are replaced even if their settings are equal.
    described = {"tandem": version("tandem"), **values}
    text = json.dumps(to_jsonable_python(described), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
