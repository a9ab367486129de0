"""JSON that generators write by a schema: the schema's check, the answer's check, positions."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.errors import InvalidRequestError, UnprocessableError

MAX_SCHEMA_CHARS = 65_536
MAX_SCHEMA_DEPTH = 32
_UNCHECKED = ("pattern", "patternProperties", "format")
"""Keywords that only the engine applies: a pattern could take Python's `re` forever."""


def response_format(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field by which a generator follows a schema."""
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raise InvalidRequestError unless a value is a usable JSON schema of an object."""
    from jsonschema import Draft202012Validator, SchemaError

    param = "json_schema"
    if len(json.dumps(schema)) > MAX_SCHEMA_CHARS:
        raise InvalidRequestError(f"{param} is longer than {MAX_SCHEMA_CHARS}", param=param)
    if schema.get("type") != "object":
        raise InvalidRequestError(f"{param}.type must be `object`", param=f"{param}.type")
    for depth, value in _walk(schema):
        if depth > MAX_SCHEMA_DEPTH:
            raise InvalidRequestError(
                f"{param} is nested deeper than {MAX_SCHEMA_DEPTH} levels", param=param
            )
        for keyword in ("$ref", "$dynamicRef"):
            reference = value.get(keyword) if isinstance(value, dict) else None
            if isinstance(reference, str) and not reference.startswith("#"):
                raise InvalidRequestError(
                    f"{param}: the reference {reference[:80]!r} is not local", param=param
                )
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        place = ".".join([param, *map(str, error.absolute_path)])
        raise InvalidRequestError(f"{place}: {error.message[:200]}", param=place) from None


def _walk(schema: Any) -> Iterator[tuple[int, Any]]:
    values: list[tuple[int, Any]] = [(1, schema)]
    while values:
        depth, value = values.pop()
        yield depth, value
        below = value.values() if isinstance(value, dict) else value
        if isinstance(value, dict | list):
            values += [(depth + 1, each) for each in below]


def parse_output(text: str, schema: Mapping[str, Any], *, is_cut: bool) -> dict[str, Any]:
    """Return a generator's JSON.

    Raises:
        UnprocessableError: It is not JSON, or not valid by the schema.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import ValidationError
    from jsonschema.validators import extend
    from referencing.exceptions import Unresolvable

    hint = "Raise `max_tokens`." if is_cut else "Use another model, or add examples."
    try:
        data = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise UnprocessableError(f"The model's answer is not JSON. {hint}") from None
    validator = extend(Draft202012Validator, dict.fromkeys(_UNCHECKED, _accept))(schema)
    try:
        validator.validate(data)
    except ValidationError as error:
        raise UnprocessableError(
            f"The model's answer is not valid by the schema: {error.message[:200]}. {hint}"
        ) from None
    except (RecursionError, Unresolvable) as error:
        raise InvalidRequestError(
            f"json_schema cannot be applied: {type(error).__name__}", param="json_schema"
        ) from None
    result: dict[str, Any] = data
    return result


def _accept(*_: Any) -> Iterator[Any]:
    return iter(())


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the JSON pointer and text of each string and number in a value."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield from leaves(below, f"{path}/{name.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from leaves(below, f"{path}/{index}")
    elif isinstance(value, str):
        if value.strip():
            yield path, value.strip()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, f"{value:g}" if isinstance(value, float) else str(value)


class Finder:
    """Positions of values in a text. Equal values get successive places."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._next: dict[str, int] = {}

    def find(self, value: str) -> tuple[int, int] | None:
        """Return start and end of a value, up to case and white space; None if it is not there."""
        words = r"\s+".join(re.escape(word) for word in value.split())
        bounded = (r"(?<!\w)" if value[0].isalnum() else "") + words
        bounded += r"(?!\w)" if value[-1].isalnum() else ""
        pattern = re.compile(bounded, re.IGNORECASE)
        found = pattern.search(self._text, self._next.get(value, 0)) or pattern.search(self._text)
        if found is None:
            return None
        self._next[value] = found.end()
        return found.span()
