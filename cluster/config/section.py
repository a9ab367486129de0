"""Base class of all configuration sections, and the handling of renamed fields."""

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

logger = logging.getLogger("ray.serve.tandem")


class Section(BaseModel):
    """Section of the configuration: frozen, without unknown fields.

    Attribute docstrings become the fields' descriptions, from which the reference is generated.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )

    renamed_fields: ClassVar[Mapping[str, str]] = {}
    """Deprecated field names and their replacements, accepted for one release."""

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
