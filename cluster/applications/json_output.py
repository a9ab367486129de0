"""JSON that generators write by a schema: the schema's check, and the answer's check."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.errors import InvalidRequestError, UnprocessableError

MAX_SCHEMA_CHARS = 65_536
MAX_SCHEMA_DEPTH = 32
MAX_DATA_DEPTH = 100
MAX_STEPS = 200_000
"""Keywords that are applied to an answer and its parts: seconds, at 6 µs each."""
_COMPARISONS_PER_STEP = 200
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
    """Return a generator's JSON, with floats as ``Number``.

    Raises:
        UnprocessableError: It is not JSON, or not valid by the schema.
        InvalidRequestError: The schema cannot be applied, or takes too long.
    """
    from jsonschema.exceptions import ValidationError
    from referencing.exceptions import Unresolvable

    hint = "Raise `max_tokens`." if is_cut else "Use another model, or add examples."
    try:
        data = json.loads(text, parse_constant=_refuse, parse_float=Number)
        json.dumps(data, ensure_ascii=False).encode()  # lone surrogates have no UTF-8
    except (ValueError, RecursionError):
        raise UnprocessableError(f"The model's answer is not JSON. {hint}") from None
    if any(depth > MAX_DATA_DEPTH for depth, _ in _walk(data)):
        raise UnprocessableError(
            f"The model's answer is nested deeper than {MAX_DATA_DEPTH} levels. {hint}"
        )
    try:
        _validator(schema).validate(data)
    except ValidationError as error:
        raise UnprocessableError(
            f"The model's answer is not valid by the schema: {error.message[:200]}. {hint}"
        ) from None
    except _TooManyStepsError:
        raise InvalidRequestError(
            "json_schema is too complex to check the answer. Use fewer nested references, or "
            "smaller lists of unique items.",
            param="json_schema",
        ) from None
    except (RecursionError, Unresolvable, ArithmeticError) as error:
        raise InvalidRequestError(
            f"json_schema cannot be applied: {type(error).__name__}", param="json_schema"
        ) from None
    result: dict[str, Any] = data
    return result


class _TooManyStepsError(Exception):
    """Validation takes too long: references can double its steps at each level."""


def _validator(schema: Mapping[str, Any]) -> Any:
    """Return a validator that neither runs the client's patterns nor takes more than seconds."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend
    from referencing import Registry

    num_left = MAX_STEPS

    def count(steps: int) -> None:
        nonlocal num_left
        num_left -= steps
        if num_left < 0:
            raise _TooManyStepsError

    def bounded(check: Any) -> Any:
        def run(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
            count(1 + (len(value) if isinstance(value, list | dict) else 0))
            return check(validator, value, instance, schema)

        return run

    def unique_items(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        if isinstance(instance, list):  # each is compared with each other one
            count(len(instance) ** 2 // _COMPARISONS_PER_STEP)
        return original["uniqueItems"](validator, value, instance, schema)

    def additional_properties(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        if "patternProperties" in schema:  # would be searched in the names
            return iter(())
        return original["additionalProperties"](validator, value, instance, schema)

    original = Draft202012Validator.VALIDATORS
    own = {"uniqueItems": unique_items, "additionalProperties": additional_properties}
    keywords = {name: bounded(check) for name, check in {**original, **own}.items()}
    unchecked = set(_UNCHECKED)
    if any(isinstance(value, dict) and "patternProperties" in value for _, value in _walk(schema)):
        unchecked.add("unevaluatedProperties")  # searches for patterns anywhere
    keywords.update(dict.fromkeys(unchecked, _accept))
    # The default registry would load what it does not know from the network.
    return extend(Draft202012Validator, keywords)(schema, registry=Registry())


def _accept(*_: Any) -> Iterator[Any]:
    return iter(())


def _refuse(constant: str) -> None:
    raise ValueError(constant)


class Number(float):
    """Float that keeps its digits, to find it in a text."""

    def __new__(cls, digits: str) -> "Number":
        """Return the number.

        Raises:
            ValueError: It is too large for a float.
        """
        number = super().__new__(cls, digits)
        if math.isinf(number):
            raise ValueError(digits)
        number.digits = digits
        return number

    digits: str


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the JSON pointer and the possible texts of each string and number in a value."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield from leaves(below, f"{path}/{name.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from leaves(below, f"{path}/{index}")
    elif isinstance(value, str):
        if value.strip():
            yield path, (value,)
    elif isinstance(value, Number):
        yield path, (value.digits, f"{value:.15g}")
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path, (str(value),)
