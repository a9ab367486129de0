"""Base class of all configuration sections, renamed fields, and descriptions of errors."""

import difflib
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from cluster.errors import ConfigError

logger = logging.getLogger("ray.serve.tandem")

# Also `$HOME` at the start of a path; elsewhere, a `$` may belong to a password.
_VARIABLE = re.compile(r"\$\{[A-Za-z_]\w*([:?+-][^}]*)?\}|^\$[A-Z_]+(?=/|$)")


class Section(BaseModel):
    """Section of the configuration: frozen, without unknown fields.

    Attribute docstrings become the fields' descriptions, from which the reference is generated.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )

    renamed_fields: ClassVar[Mapping[str, str]] = {}
    """Deprecated field names and their replacements, accepted for one release."""

    restart_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that a process reads only when it starts. All others can change while it runs."""

    def restart_value(self, field: str) -> Any:
        """Return the part of a field that only a restart can change; None if all changes live."""
        return getattr(self, field) if field in self.restart_fields else None

    @classmethod
    def rename_deprecated(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``values`` under the current field names; log each deprecated name.

        Raises:
            ValueError: a field is set under both its old and its new name.
        """
        current = dict(values)
        for old, new in cls.renamed_fields.items():
            if old not in current:
                continue
            if new in current:
                raise ValueError(f"{old} is the deprecated name of {new}; set only {new}")
            logger.warning("Configuration field %s is deprecated; use %s.", old, new)
            current[new] = current.pop(old)
        return current

    @model_validator(mode="before")
    @classmethod
    def _rename_deprecated(cls, values: Any) -> Any:
        return cls.rename_deprecated(values) if isinstance(values, Mapping) else values


_EXPECTED = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "it must be an integer"),
    **dict.fromkeys(("float_parsing", "float_type"), "it must be a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "it must be true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "it must be a list, such as [a, b]"),
    **dict.fromkeys(("model_type", "dict_type"), "it must be a mapping, such as {a: 1}"),
    "string_type": "it must be a string",
}
"""Descriptions of pydantic's errors that speak of Python's types."""


def first_error(error: ValidationError) -> Any:
    """Return the error to report: an unknown field, which may be why others are missing."""
    return min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")


def describe(error: ValidationError, root: str) -> str:
    """Describe one error in one line; ``root`` names the whole, which has no path."""
    first = first_error(error)
    path = ".".join(map(str, first["loc"])) or root
    value = "no value" if first["input"] is None else repr(first["input"])
    if len(value) > 80:
        value = f"{value[:79]}…"
    if first["type"] == "extra_forbidden":
        return f"{path}: no such field (value {value})"
    if first["type"] == "missing":
        return f"{path}: missing; this field is required"
    problem = " ".join(first["msg"].removeprefix("Value error, ").split())
    problem = _EXPECTED.get(first["type"], problem[0].lower() + problem[1:])
    if first["type"] == "literal_error":
        problem = f"allowed: {first['ctx']['expected']}"
    if first["type"] == "string_type" and isinstance(first["input"], int | float):
        problem += ": put it in quotes"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "value_error" and isinstance(first["input"], Mapping):
        return f"{path}: {problem}{more}"  # our checks of whole sections name field and value
    return f"{path}: got {value}; {problem}{more}"


def reject_variables(values: Any, path: str = "") -> None:
    """Raise if a string refers to an environment variable, which nothing expands.

    Expanding them here would be wrong: ``tandem`` and ``serve deploy`` load the same file on
    different machines, with different variables.

    Raises:
        ConfigError: names the field, its value and the alternatives.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            reject_variables(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            reject_variables(value, f"{path}.{index}")
    elif isinstance(values, str) and (found := _VARIABLE.search(values)):
        raise ConfigError(
            f"{path}: got {values[:80]!r}; environment variables such as {found[0][:40]} are not "
            f"expanded. Pass the value with --set {path}=…, or expand the file with `envsubst`"
        )


def list_allowed(name: str, allowed: Collection[str]) -> str:
    """List the allowed names, and suggest the one most similar to ``name``."""
    similar = difflib.get_close_matches(name, allowed, n=1)
    start = f"did you mean {similar[0]!r}? Allowed" if similar else "allowed"
    return f"{start}: {', '.join(allowed)}"
