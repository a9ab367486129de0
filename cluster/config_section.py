"""What every section of the configuration has in common: frozen, and no unknown fields."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
