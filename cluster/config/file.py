"""Loading of ``ray-config.yaml`` with ``--set`` overrides.

The file is a Ray Serve config. Tandem's configuration is the ``args`` of the application whose
``import_path`` is ``deployments.app:build``.
"""

import hashlib
import ipaddress
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from cluster.config.application import TandemConfig, parse
from cluster.config.overrides import apply_override
from cluster.config.router import RouterConfig
from cluster.config.section import describe, list_allowed, reject_variables
from cluster.config.yaml_text import parse_yaml
from cluster.errors import ConfigError
from cluster.key_file import read_keys
from cluster.models.store import home

IMPORT_PATH = "deployments.app:build"
AUTOSCALING_POLICY = {"policy_function": "deployments.autoscaling:ApplicationPolicy"}
"""Policy of all deployments. Serve accepts an application-level policy only in its config."""
DEFAULT_PORT = 8000
DEFAULT_HOST = "127.0.0.1"
ALL_ADDRESSES = "0.0.0.0"
KEY_FILE = "keys.yaml"


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """Validated configuration."""

    path: Path
    serve_config: dict[str, Any]
    """Serve config to deploy: the file with the overrides applied."""
    application: str
    config: TandemConfig
    http_host: str
    http_port: int
    overrides: tuple[str, ...] = ()
    """``path=value`` strings from the command line."""


def load(path: Path, overrides: Sequence[str] = (), *, address: str | None = None) -> LoadedConfig:
    """Read ``path``, apply the ``path=value`` overrides, and validate the result.

    With ``address``, that of the head of several nodes, every node serves HTTP on all its
    addresses.

    Raises:
        ConfigError: one line with the field, the value and what is allowed.
    """
    serve_config = _read(path)
    application = _find_application(path, serve_config)
    application.setdefault("autoscaling_policy", dict(AUTOSCALING_POLICY))
    for override in overrides:
        apply_override(serve_config, application, override)
    reject_variables(serve_config.get("http_options"), "http_options")
    _check_serve_level(serve_config)
    config = parse(application.get("args") or {})
    host, port = _http_address(serve_config)
    if address is not None:
        host = _host_of_every_node(host)
        serve_config["proxy_location"] = "EveryNode"
    keys = key_file_path(config.router)
    _check_exposure(host, config, keys, several_nodes=address is not None)
    if found := _key_source(config.router, keys, several_nodes=address is not None):
        args = application["args"] = {**(application.get("args") or {})}
        args["router"] = {**(args.get("router") or {}), **found}
        config = config.model_copy(update={"router": config.router.model_copy(update=found)})
    # With HAProxy, Serve listens on all addresses by default.
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


def _key_source(router: RouterConfig, keys: Path, *, several_nodes: bool) -> dict[str, Any]:
    """Return the router's settings of its keys, explicit in the deployed configuration.

    A router that cannot find a configured key file rejects all requests.
    """
    if several_nodes and router.keys_file is None:
        return {"keys_in_cluster": True}
    return {"keys_file": str(keys)} if router.keys_file or keys.exists() else {}


def key_file_path(router: RouterConfig) -> Path:
    """Return the path of the key file: ``router.keys_file``, or ``keys.yaml`` in Tandem's home."""
    return Path(router.keys_file).expanduser() if router.keys_file else home() / KEY_FILE


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a Serve config must be a mapping, got {type(content).__name__}")
    return content


def _find_application(path: Path, serve_config: dict[str, Any]) -> dict[str, Any]:
    applications = serve_config.get("applications")
    if not isinstance(applications, list) or not all(isinstance(a, dict) for a in applications):
        raise ConfigError(f"{path}: applications: a list of applications is required")
    ours: list[dict[str, Any]] = [a for a in applications if a.get("import_path") == IMPORT_PATH]
    if len(ours) != 1:
        raise ConfigError(
            f"{path}: applications: exactly one with import_path {IMPORT_PATH!r} is required, "
            f"found {len(ours)}"
        )
    return ours[0]


def _check_serve_level(serve_config: dict[str, Any]) -> None:
    """Validate everything but our ``args`` against Serve's schema."""
    applications = [{**application, "args": {}} for application in serve_config["applications"]]
    bare = {**serve_config, "applications": applications}
    text = json.dumps([2, version("ray"), bare], sort_keys=True, default=str)
    # Importing Serve's schema takes seconds, so valid configs are remembered by their digest.
    marker = home() / "run" / f"serve-config-{hashlib.sha256(text.encode()).hexdigest()[:16]}.ok"
    if marker.exists():
        return
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    try:
        ServeDeploySchema.model_validate(bare)
    except ValidationError as error:
        raise ConfigError(describe(error, "Serve config")) from None
    # Serve ignores unknown fields.
    _check_names(serve_config, ServeDeploySchema, "")
    _check_names(serve_config.get("http_options") or {}, HTTPOptionsSchema, "http_options.")
    for index, application in enumerate(applications):
        _check_names(application, ServeApplicationSchema, f"applications.{index}.")
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _check_names(values: Mapping[str, Any], schema: type[BaseModel], path: str) -> None:
    for name in values:
        if name not in schema.model_fields and not name.startswith("x-"):  # for YAML's anchors
            allowed = list_allowed(name, schema.model_fields)
            raise ConfigError(f"{path}{name}: Ray Serve has no such field; {allowed}")


def _http_address(serve_config: dict[str, Any]) -> tuple[str, int]:
    http = serve_config.get("http_options") or {}
    host = http.get("host") or DEFAULT_HOST
    port = http.get("port", DEFAULT_PORT)
    if isinstance(port, str) and port.isdecimal():
        raise ConfigError(
            f"http_options.port: got {port!r}; it must be a number, not a string: remove the quotes"
        )
    if not isinstance(port, int) or not 1 <= port <= 65535:  # Serve does not check the range
        raise ConfigError(f"http_options.port: got {port!r}; allowed: 1 to 65535")
    return host, port


def _host_of_every_node(host: str) -> str:
    if is_loopback(host):
        return ALL_ADDRESSES
    if host not in (ALL_ADDRESSES, "::"):
        raise ConfigError(
            f"http_options.host: got {host!r}, which only one node can have; use {ALL_ADDRESSES}"
        )
    return host


def _check_exposure(host: str, config: TandemConfig, keys: Path, *, several_nodes: bool) -> None:
    contents, router = read_keys(keys), config.router
    configured_keys = router.api_keys_sha256 or router.operator_keys_sha256
    # Routers reject every request until they find a configured file, or keys in the cluster.
    is_elsewhere = router.keys_in_cluster or (router.keys_file is not None and contents is None)
    has_keys = configured_keys or is_elsewhere or (contents and contents.keys)
    if not has_keys and not router.open and not is_loopback(host):
        advice = (
            "add a key (`tandem keys add TENANT` or router.api_keys_sha256), or set "
            "router.open=true to accept every request"
        )
        if several_nodes:
            raise ConfigError(
                f"on several nodes, HTTP is reachable from other machines ({host}), but there are "
                f"no API keys; {advice}"
            )
        raise ConfigError(
            f"http_options.host: got {host!r}, which is reachable from other machines, but there "
            f"are no API keys; use a loopback address, {advice}"
        )


def is_loopback(host: str | None) -> bool:
    """Return True if other machines cannot reach the address; None stands for all addresses."""
    if host == "localhost":
        return True
    try:
        return host is not None and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
