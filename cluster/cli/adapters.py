"""``tandem adapters``: LoRA adapters of the running cluster."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from cluster.cli import router_client
from cluster.cli.defaults import router_url, running_application
from cluster.config import GeneratorConfig, TandemConfig, parse
from cluster.config.changes import compare
from cluster.errors import ConfigError, StartError, UnavailableError
from cluster.launch.serve_api import ServeApi

TIMEOUT_S = 300.0
"""Maximum time for all replicas to load an adapter, downloads included, in seconds."""
POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Deployed:
    """The running cluster's configuration, which can be changed."""

    api: ServeApi
    application: str
    args: dict[str, Any]

    @property
    def config(self) -> TandemConfig:
        return parse(self.args)

    def with_adapters(self, generator: str, adapters: dict[str, str]) -> dict[str, Any]:
        """Return the args with other adapters of a generator."""
        generators = [
            {**each, "adapters": adapters} if each["name"] == generator else each
            for each in self.args["generators"]
        ]
        return {**self.args, "generators": generators}


@contextmanager
def _deployed() -> Iterator[Deployed]:
    with running_application() as (api, application):
        yield Deployed(api, application, api.deployed_args(application))


def add(name: str, path: str, model: str | None, key: str | None) -> None:
    """Add an adapter to all replicas of a generator; change nothing if one cannot load it.

    Raises:
        ConfigError: the name, the path or the generator is wrong, or a replica cannot load it.
        StartError: no cluster runs, or the replicas did not load it in time.
    """
    with _deployed() as deployed:
        pool = _generator(deployed.config, model)
        if name in deployed.config.model_names:
            raise ConfigError(f"A model or adapter named {name!r} exists already.")
        args = deployed.with_adapters(pool.name, {**pool.adapters, name: path})
        if restarts := compare(deployed.config, parse(args)).restarts:
            raise ConfigError(
                f"The replicas of {pool.name} run without support for adapters, so this would "
                f"replace those of {', '.join(restarts)}. Add `adapters` or "
                "`engine_args: {max_loras: …}` to the file and deploy it."
            )
        deployed.api.deploy_args(deployed.application, args)
        try:
            _wait(lambda: _missing(deployed, pool.name, name, key))
        except BaseException:
            deployed.api.deploy_args(deployed.application, deployed.args)
            raise
    typer.echo(f"All replicas of {pool.name} serve {name}. Add it to the file, too:")
    typer.echo(f"  adapters: {{{name}: {path}}}")


def remove(name: str) -> None:
    """Remove an adapter from all replicas; its running requests end normally.

    Raises:
        ConfigError: there is no such adapter.
        StartError: no cluster runs.
    """
    with _deployed() as deployed:
        config = deployed.config
        pool = next((each for each in config.generators if name in each.adapters), None)
        if pool is None:
            known = [each for pool in config.generators for each in pool.adapters]
            raise ConfigError(f"No adapter {name!r}; known: {', '.join(known) or 'none'}")
        adapters = {each: path for each, path in pool.adapters.items() if each != name}
        args = deployed.with_adapters(pool.name, adapters)
        if restarts := compare(config, parse(args)).restarts:
            raise ConfigError(
                f"{name!r} is the last adapter of {pool.name}; removing it would replace the "
                f"replicas of {', '.join(restarts)} by some without support for adapters. To do "
                "so, deploy a file without it. To keep the support, set `engine_args.max_loras`."
            )
        deployed.api.deploy_args(deployed.application, args)
    typer.echo(f"Removed {name} from {pool.name}. Remove it from the file, too.")


def show(key: str | None, *, as_json: bool) -> None:
    """Print the adapters of all generators, and the replicas that serve them."""
    with _deployed() as deployed:
        generators = deployed.config.generators
    pools = _pools(key)
    rows = [
        {"name": name, "model": pool.name, "path": path, **_status(pools, pool.name, name)}
        for pool in generators
        for name, path in pool.adapters.items()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("adapter", "model", "path", "replicas", "errors", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(str, (*list(row.values())[:4], "; ".join(row["errors"]))))
    Console().print(table if rows else "No adapters.", highlight=False)


def _generator(config: TandemConfig, model: str | None) -> GeneratorConfig:
    generators = {each.name: each for each in config.generators}
    if model is None and len(generators) == 1:
        return next(iter(generators.values()))
    if model not in generators:
        names = ", ".join(generators) or "none"
        problem = "Several generators run; set --model" if model is None else f"No {model!r}"
        raise ConfigError(f"{problem}; generators: {names}")
    return generators[model]


def _pools(key: str | None) -> dict[str, Any]:
    with router_client.connect(router_url(None), key) as router:
        pools: dict[str, Any] | None = router.get("/ready").get("pools")
    if pools is None:
        raise ConfigError("The state of the pools needs an operator key: set TANDEM_API_KEY.")
    return pools


def _status(pools: dict[str, Any], pool: str, name: str) -> dict[str, Any]:
    status: dict[str, Any] = pools[pool]["adapters"].get(name, {"replicas": 0, "errors": []})
    return status


def _missing(deployed: Deployed, pool: str, name: str, key: str | None) -> str | None:
    """Return what an adapter waits for; None once all replicas serve it.

    Raises:
        ConfigError: a replica cannot load it.
        StartError: Ray Serve cannot apply the configuration.
    """
    application = deployed.api.application(deployed.application)
    if application is None:
        return "Ray's dashboard does not answer"
    if application.failure:
        raise StartError(f"Ray Serve cannot apply the configuration: {application.failure}")
    try:
        pools = _pools(key)
    except UnavailableError as error:  # some pool is not ready
        return f"the router is not ready: {error}"
    status, replicas = _status(pools, pool, name), pools[pool]["replicas"]
    if status["errors"]:
        raise ConfigError(f"The adapter {name!r} cannot be loaded: {'; '.join(status['errors'])}")
    if name not in pools[pool]["adapters"]:
        return "a router has not applied the configuration"
    if status["replicas"] < replicas:
        return f"{status['replicas']} of {replicas} replicas serve it"
    return None if application.running else f"the application is {application.status}"


def _wait(missing: Callable[[], str | None]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while (problem := missing()) is not None:
        if time.monotonic() > deadline:
            raise StartError(f"Waited {TIMEOUT_S:g} s for the adapter: {problem}.")
        time.sleep(POLL_S)
