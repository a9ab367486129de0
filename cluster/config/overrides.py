"""``--set path=value``: setting a field of a Serve config by its path.

Paths lead to Tandem's fields (``generators.smollm2.replicas.max``, ``router.max_queued``) or to
those of the Serve config (``http_options.port``). Names are checked here, values on validation.
"""

from collections.abc import Collection
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from cluster.config.application import SERVE_LEVEL, TandemConfig
from cluster.config.section import Section, list_allowed
from cluster.config.yaml_text import parse_yaml
from cluster.errors import ConfigError

HTTP_OPTIONS = ("host", "port", "root_path", "request_timeout_s", "keep_alive_timeout_s")


def apply_override(
    serve_config: dict[str, Any], application: dict[str, Any], override: str
) -> None:
    """Apply one ``path=value`` to a Serve config in place; the value is parsed as YAML.

    Raises:
        ConfigError: there is no ``=``, the value is not YAML, or the path does not exist.
    """
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: expected path=value, such as router.max_queued=100")
    value = parse_yaml(text, f"--set {override}: the value {text!r}")
    if parts[0] in SERVE_LEVEL:
        if parts[0] == "http_options" and len(parts) > 1 and parts[1] not in HTTP_OPTIONS:
            raise _unknown(override, parts[1], HTTP_OPTIONS)
        for part in parts[:-1]:
            serve_config = _submapping(serve_config, part, override)
        serve_config[parts[-1]] = value
    else:
        args = application["args"] = application.get("args") or {}
        _set_field(args, parts, value, override)


def _set_field(args: dict[str, Any], parts: list[str], value: Any, override: str) -> None:
    node: Any = args
    kind: Any = TandemConfig
    depth = 0
    while depth < len(parts):
        if isinstance(node, list):
            index, length = _index(node, parts[depth:], override)
            depth += length
            kind = get_args(kind)[0]
            if depth == len(parts):
                node[index] = value
            node = node[index]
            continue
        name = _current_name(kind, node, parts[depth], override)
        kind = _field_type(kind, name, override, top=depth == 0)
        depth += 1
        if depth == len(parts):
            node[name] = value
        elif get_origin(kind) is tuple:
            node = node.setdefault(name, [])
        else:
            node = _submapping(node, name, override)


def _current_name(kind: Any, node: dict[str, Any], name: str, override: str) -> str:
    """Return the current name of a field, after renaming deprecated fields in the file."""
    if not (isinstance(kind, type) and issubclass(kind, Section)):
        return name
    try:
        renamed = kind.rename_deprecated(node)
        ((current, _),) = kind.rename_deprecated({name: None}).items()
    except ValueError as error:
        raise ConfigError(f"--set {override}: {error}") from None
    node.clear()
    node.update(renamed)
    return current


def _field_type(kind: Any, name: str, override: str, *, top: bool) -> Any:
    """Return the type of a field; free-form mappings such as engine_args accept any name."""
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return Any
    if name not in kind.model_fields:
        known = [*kind.model_fields, *(SERVE_LEVEL if top else ())]
        raise _unknown(override, name, known)
    return kind.model_fields[name].annotation


def _submapping(node: dict[str, Any], name: str, override: str) -> dict[str, Any]:
    if node.get(name) is None:
        node[name] = {}
    child = node[name]
    if not isinstance(child, dict):
        raise ConfigError(f"--set {override}: {name} is {child!r}, which has no fields")
    return child


def _index(items: list[Any], parts: list[str], override: str) -> tuple[int, int]:
    """Return the index of an element, and how many parts of the path name it.

    The parts begin with the element's ``name``, which may contain dots, or with its index.
    """
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in names:
            return names.index(name), length
    if parts[0].isdecimal() and int(parts[0]) < len(items):
        return int(parts[0]), 1
    raise _unknown(override, parts[0], [name for name in names if name])


def _unknown(override: str, name: str, allowed: Collection[str]) -> ConfigError:
    return ConfigError(f"--set {override}: no {name!r}; {list_allowed(name, allowed)}")
