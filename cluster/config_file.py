"""``ray-config.yaml`` and ``--set``: from a file to a checked Serve config and a ``TandemConfig``.

The file is a Ray Serve config; Tandem's own part is the ``args`` of its one application whose
``import_path`` is ours. Owns nothing but a note of Serve-level parts that Serve found valid.
"""

import hashlib
import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.config import RouterConfig, TandemConfig, parse
from cluster.config_path import assign
from cluster.errors import ConfigError
from cluster.key_file import read_keys
from cluster.models.store import home

IMPORT_PATH = "deployments.app:build"
AUTOSCALING_POLICY = {"policy_function": "deployments.autoscaling:ApplicationPolicy"}
"""Serve takes the policy of a whole application from its configuration alone."""
DEFAULT_PORT = 8000
DEFAULT_HOST = "127.0.0.1"
KEY_FILE = "keys.yaml"


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration in which every value has been checked."""

    path: Path
    serve_config: dict[str, Any]
    """What Serve deploys: the file with the overrides in it."""
    application: str
    config: TandemConfig
    http_host: str
    http_port: int
    overrides: tuple[str, ...] = ()
    """As they were given."""


def load(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read ``path``, apply each ``path=value`` of ``overrides``, and check everything.

    Raises:
        ConfigError: one line that names the field, the value and what is allowed.
    """
    serve_config = _read(path)
    application = _application(path, serve_config)
    application.setdefault("autoscaling_policy", dict(AUTOSCALING_POLICY))
    for override in overrides:
        assign(serve_config, application, override)
    _check_serve_level(serve_config)
    config = parse(application.get("args") or {})
    host, port = _listen_on(serve_config)
    keys = key_file_path(config.router)
    _check_exposure(host, config, keys)
    if config.router.keys_file or keys.exists():
        # Named in what Serve gets, so that a router that does not find it lets nobody in.
        args = application["args"] = {**(application.get("args") or {})}
        args["router"] = {**(args.get("router") or {}), "keys_file": str(keys)}
        config = parse(args)
    # With HAProxy, Serve's own default is every address.
    serve_config["http_options"] = {**(serve_config.get("http_options") or {}), "host": host}
    return LoadedConfig(
        path=path,
        serve_config=serve_config,
        application=application.get("name") or "default",
        config=config,
        http_host=host,
        http_port=port,
        overrides=tuple(overrides),
    )


def key_file_path(router: RouterConfig) -> Path:
    """Where the keys of this configuration lie: ``router.keys_file``, else in Tandem's home."""
    return Path(router.keys_file).expanduser() if router.keys_file else home() / KEY_FILE


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as stream:
            found = yaml.safe_load(stream)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_where(error)}: not valid YAML: {_problem(error)}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: a Serve config is a mapping, got {type(found).__name__}")
    return found


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f", line {mark.line + 1}"


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def _application(path: Path, serve_config: dict[str, Any]) -> dict[str, Any]:
    applications = serve_config.get("applications")
    if not isinstance(applications, list) or not all(isinstance(a, dict) for a in applications):
        raise ConfigError(f"{path}: applications: a list of applications is needed")
    ours: list[dict[str, Any]] = [a for a in applications if a.get("import_path") == IMPORT_PATH]
    if len(ours) != 1:
        raise ConfigError(
            f"{path}: applications: one with import_path {IMPORT_PATH!r} is needed, "
            f"{len(ours)} are there"
        )
    return ours[0]


def _check_serve_level(serve_config: dict[str, Any]) -> None:
    """Let Serve's own schema check everything but our ``args``.

    Importing the schema takes seconds, so what it once found valid is noted by its digest.
    """
    bare = {
        **serve_config,
        "applications": [_without_args(a) for a in serve_config["applications"]],
    }
    text = json.dumps([version("ray"), bare], sort_keys=True, default=str)
    note = home() / "run" / f"serve-config-{hashlib.sha256(text.encode()).hexdigest()[:16]}.ok"
    if note.exists():
        return
    from ray.serve.schema import ServeDeploySchema

    try:
        ServeDeploySchema.model_validate(bare)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None
    note.parent.mkdir(parents=True, exist_ok=True)
    note.touch()


def _without_args(application: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in application.items() if key != "args"}


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"]) or "Serve config"
    problem = " ".join(first["msg"].removeprefix("Value error, ").split())
    if first["type"] == "extra_forbidden":
        return f"{path}: no such field (value {first['input']!r}) in a Serve config"
    return f"{path}: got {str(first['input'])[:80]!r}; {problem[0].lower()}{problem[1:]}"


def _listen_on(serve_config: dict[str, Any]) -> tuple[str, int]:
    http = serve_config.get("http_options") or {}
    host = http.get("host") or DEFAULT_HOST
    port = http.get("port", DEFAULT_PORT)
    if not isinstance(port, int) or not 1 <= port <= 65535:  # Serve takes any number
        raise ConfigError(f"http_options.port: got {port!r}; allowed: 1 to 65535")
    return host, port


def _check_exposure(host: str, config: TandemConfig, keys: Path) -> None:
    contents = read_keys(keys)
    known = config.router.api_keys_sha256 or (contents and contents.keys)
    if not known and not _is_loopback(host):
        raise ConfigError(
            f"http_options.host: got {host!r}, which others can reach, without API keys; allowed: "
            f"a loopback address, or any once there is a key (`tandem keys add TENANT`, or "
            f"router.api_keys_sha256)"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
