"""Changes of the deployed configuration by rollouts: their section, and the model at the end."""

import copy
from collections.abc import Iterator
from typing import Any

from cluster.config import RolloutConfig, parse
from cluster.config.file import IMPORT_PATH
from cluster.errors import ConfigError, InvalidRequestError, NotFoundError, UnsupportedError
from cluster.serve_internals import apply_serve_config, read_serve_config


async def start_rollout(app: str, pool: str, settings: dict[str, Any]) -> None:
    """Add the section ``rollout`` to a pool and deploy.

    Raises:
        InvalidRequestError: The settings are invalid, or a rollout of the pool is in progress.
        NotFoundError: There is no such pool.
        UnsupportedError: The application was not deployed from a configuration.
    """

    def add(section: dict[str, Any]) -> None:
        if section.get("rollout"):
            raise InvalidRequestError(
                f"A rollout of `{pool}` is in progress. See `tandem rollout status`, or end it "
                f"with `tandem rollout abort {pool}`."
            )
        section["rollout"] = settings

    await _change(app, pool, add)


async def finish_rollout(app: str, pool: str, rule: RolloutConfig, *, promoted: bool) -> None:
    """Remove the section ``rollout`` of this version, and set the pool's model if promoted."""

    def remove(section: dict[str, Any]) -> None:
        deployed = section.get("rollout") or {}
        if (deployed.get("version"), deployed.get("model")) != (rule.version, rule.model):
            return  # someone else has deployed another configuration
        del section["rollout"]
        if promoted:
            section |= {"model": rule.model, "version": rule.version}

    await _change(app, pool, remove)


async def deployed_rollouts(app: str) -> dict[str, RolloutConfig]:
    """Return the sections ``rollout`` of the deployed configuration, by their pool."""
    configs, _ = await read_serve_config()
    if not _is_ours(configs.get(app)):
        return {}
    pools = parse(configs[app].args).pools
    return {pool.name: pool.rollout for pool in pools if pool.rollout is not None}


async def _change(app: str, pool: str, change: Any) -> None:
    configs, details = await read_serve_config()
    if not _is_ours(configs.get(app)):
        raise UnsupportedError("The application was not deployed from a Tandem configuration.")
    args = copy.deepcopy(configs[app].args)
    sections = [section for section in _pools(args) if section.get("name") == pool]
    if not sections:
        raise NotFoundError(f"There is no pool `{pool}`.")
    change(sections[0])
    if args == configs[app].args:
        return
    try:
        parse(args)
    except ConfigError as error:
        raise InvalidRequestError(str(error)) from None
    changed = configs[app].model_copy(update={"args": args})
    applications = [changed if name == app else config for name, config in configs.items()]
    await apply_serve_config(applications, details.get("target_capacity"))


def _is_ours(config: Any) -> bool:
    """Return True if an application was deployed from a Tandem configuration."""
    return config is not None and config.import_path == IMPORT_PATH


def _pools(args: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for kind in ("generators", "classifiers"):
        yield from args.get(kind) or ()
