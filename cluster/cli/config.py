"""``tandem config check``, ``tandem config show`` and ``tandem config diff``."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import typer
import yaml

from cluster.cli.defaults import running_application
from cluster.config import TandemConfig, parse
from cluster.config.changes import compare
from cluster.config.file import LoadedConfig
from cluster.errors import ConfigError
from cluster.models.store import CATALOGUE, resolve


def check(loaded: LoadedConfig, *, files: bool) -> None:
    """Print what a valid configuration serves.

    Raises:
        ConfigError: with ``files``, files that it names do not exist on this machine.
    """
    problems = list(_missing_files(loaded.config)) if files else []
    if problems:
        raise ConfigError(f"{loaded.path}: {'; '.join(problems)}")
    typer.echo(f"{loaded.path}: valid; serves {', '.join(loaded.config.model_names)}")


def show(loaded: LoadedConfig, *, as_json: bool) -> None:
    """Print the configuration, including all defaults."""
    complete = json.loads(loaded.config.model_dump_json())
    text = (
        json.dumps(complete, indent=2) + "\n"
        if as_json
        else yaml.safe_dump(complete, sort_keys=False)
    )
    typer.echo(text, nl=False)


def diff(loaded: LoadedConfig, *, as_json: bool) -> None:
    """Print what deploying the configuration to the running cluster would change and restart.

    Raises:
        StartError: no cluster runs, or its configuration cannot be read.
    """
    with running_application() as (api, application):
        args = api.deployed_args(application)
    changes = compare(parse(args), loaded.config)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(changes), indent=2))
        return
    lines = [f"changes live: {path}" for path in changes.live]
    for name, reasons in changes.restarts.items():
        lines.append(f"replaces the replicas of {name}: {', '.join(reasons)}")
    lines += [f"adds {name}" for name in changes.added]
    lines += [f"removes {name}" for name in changes.removed]
    lines += [f"needs `tandem down` and `tandem up`: {path}" for path in changes.cluster]
    typer.echo("\n".join(lines) or "The running cluster has this configuration.")


def _missing_files(config: TandemConfig) -> Iterator[str]:
    for field, model in _models(config):
        if problem := _problem(model):
            yield f"{field}: {problem}"
    keys = config.router.keys_file
    if keys is not None and not Path(keys).is_file():
        yield (
            f"router.keys_file: {keys} does not exist, so every request would be rejected; "
            f"create it with `tandem keys add TENANT`"
        )


def _models(config: TandemConfig) -> Iterator[tuple[str, str]]:
    """Yield field and value of each model and adapter that an engine loads."""
    for index, generator in enumerate(config.generators):
        if generator.engine == "vllm":
            yield f"generators.{index}.model", generator.model
            for name, path in generator.adapters.items():
                yield f"generators.{index}.adapters.{name}", path
    for index, classifier in enumerate(config.classifiers):
        yield f"classifiers.{index}.model", classifier.model


def _problem(model: str) -> str | None:
    if model in CATALOGUE:  # `tandem up` builds it
        return None
    try:
        resolved = Path(resolve(model))
    except ConfigError as error:
        return str(error).removeprefix("model: ")
    if resolved.is_absolute() and not any(map(Path.is_file, map(resolved.joinpath, _CONFIGS))):
        return f"{resolved} contains no model ({' or '.join(_CONFIGS)})"
    if not resolved.is_absolute() and "/" in model and resolved.parent.is_dir():
        return f"{model!r} does not exist in the directory {resolved.parent.absolute()}"
    return None


_CONFIGS = ("config.json", "params.json", "adapter_config.json")
"""Files of which every directory of a model or adapter has one."""
