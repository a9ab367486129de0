"""``--set path=value``: finding a field by its path in a Serve config, and setting it.

Paths are Tandem's own (``generators.smollm2.replicas.max``, ``router.max_queued``) or the Serve
config's (``http_options.port``). Changes the mapping that it is given; checks names, not values.
"""

import difflib
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

from cluster.config import TandemConfig
from cluster.errors import ConfigError

SERVE_LEVEL = (
    "http_options", "grpc_options", "logging_config", "proxy_location", "target_capacity",
    "controller_options",
)  # fmt: skip
HTTP_OPTIONS = ("host", "port", "root_path", "request_timeout_s", "keep_alive_timeout_s")


def assign(serve_config: dict[str, Any], application: dict[str, Any], override: str) -> None:
    """Apply one ``path=value``; the value is read as YAML.

    Raises:
        ConfigError: no ``=``, a value that is not YAML, or a path that does not exist.
    """
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: allowed: path=value, as in router.max_queued=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value {text!r} is not valid YAML") from None
    if parts[0] in SERVE_LEVEL:
        _assign_serve(serve_config, parts, value, override)
    else:
        args = application["args"] = application.get("args") or {}
        _assign_ours(args, parts, value, override)


def _assign_serve(config: dict[str, Any], parts: list[str], value: Any, override: str) -> None:
    if parts[0] == "http_options" and len(parts) > 1 and parts[1] not in HTTP_OPTIONS:
        raise _unknown(override, parts[1], HTTP_OPTIONS)
    at = config
    for part in parts[:-1]:
        at = _mapping_at(at, part, override)
    at[parts[-1]] = value


def _assign_ours(args: dict[str, Any], parts: list[str], value: Any, override: str) -> None:
    at: Any = args
    kind: Any = TandemConfig
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(at, list):
            index = _index(at, part, override)
            kind = get_args(kind)[0]
            if last:
                at[index] = value
            at = at[index]
            continue
        kind = _field_type(kind, part, override, top=depth == 0)
        if last:
            at[part] = value
        elif _is_tuple(kind):
            at = at.setdefault(part, [])
        else:
            at = _mapping_at(at, part, override)


def _field_type(kind: Any, name: str, override: str, *, top: bool) -> Any:
    """The type of field ``name``; free-form mappings such as engine_args take any name."""
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return Any
    if name not in kind.model_fields:
        known = [*kind.model_fields, *(SERVE_LEVEL if top else ())]
        raise _unknown(override, name, known)
    return kind.model_fields[name].annotation


def _is_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple


def _mapping_at(at: dict[str, Any], part: str, override: str) -> dict[str, Any]:
    if at.get(part) is None:
        at[part] = {}
    found = at[part]
    if not isinstance(found, dict):
        raise ConfigError(f"--set {override}: {part} holds {found!r}, which has no fields")
    return found


def _index(items: list[Any], part: str, override: str) -> int:
    """Where in a list ``part`` points: an element's ``name``, or its index."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    raise _unknown(override, part, [name for name in names if name])


def _unknown(override: str, name: str, known: Any) -> ConfigError:
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"--set {override}: no {name!r}; allowed: {', '.join(known)}{hint}")
