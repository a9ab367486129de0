"""Contents of a key file: API keys and tenants. Pure: text in, text out.

Keys are stored as SHA-256 digests. A slow hash would not protect them better, because they are long
and random. Looking up digests in a mapping leaks nothing useful through timing, because an attacker
cannot choose the digest of a guess.
"""

import secrets
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Annotated, Any, ClassVar, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.admission.budgets import Budget
from cluster.admission.identity import (
    MAX_PRIORITY,
    MIN_PRIORITY,
    Identity,
    Tenant,
    TenantLimits,
)
from cluster.config.guards import GuardName
from cluster.config.pools import ModelName
from cluster.config.section import Section
from cluster.config.yaml_text import parse_yaml
from cluster.errors import ConfigError

KEY_PREFIX = "tnd-"
ID_CHARS = 16
"""Characters of a key's digest that identify the key in lists and logs."""
_KEY_BYTES = 32
MAX_MODELS_BYTES = 256 * 1024
"""Longest list of a key's models, in bytes as JSON. Routers send it to applications as a header, in
base64: a third more, which fits a frame (1 MiB) together with the longest headers of a client."""
BUDGET_FIELDS = ("cost_per_day", "cost_per_month", "soft_share")

# Written in C, four times faster; absent if PyYAML was built without libyaml.
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
TenantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Limit = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class TenantEntry(Section):
    """A tenant in a key file; a limit that is not set does not apply."""

    renamed_fields: ClassVar[Mapping[str, str]] = {"max_ongoing": "max_concurrent"}

    weight: float = Field(1.0, ge=0, le=1e6, allow_inf_nan=False)
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    max_concurrent: int | None = Field(None, ge=1)
    tokens_per_day: Limit | None = None
    guards: tuple[GuardName, ...] | None = None
    """Guards that check the tenant's requests; None: those that are the default."""
    cost_per_day: Limit | None = None
    """Budget per UTC day, in the currency of `accounting`."""
    cost_per_month: Limit | None = None
    soft_share: float = Field(0.8, gt=0, le=1)
    """Share of a budget (0 to 1) at which the alert fires."""

    def tenant(self, name: str) -> Tenant:
        """Return the tenant under this name."""
        limits = self.model_dump(exclude={"weight", "guards", *BUDGET_FIELDS})
        budget = Budget(**self.model_dump(include=set(BUDGET_FIELDS)))
        return Tenant(name, self.weight, TenantLimits(**limits), budget)


class KeyEntry(Section):
    """A key in a key file."""

    sha256: Digest
    tenant: TenantName
    priority: int = Field(0, ge=MIN_PRIORITY, le=MAX_PRIORITY)
    models: tuple[ModelName, ...] | None = None
    """Models that the key may use, by any of their names; None: all."""
    guards: tuple[GuardName, ...] | None = None
    """Guards that check the key's requests; None: the tenant's."""
    cost_per_day: Limit | None = None
    cost_per_month: Limit | None = None
    soft_share: float = Field(0.8, gt=0, le=1)

    @field_validator("models")
    @classmethod
    def _check_length(cls, models: tuple[str, ...] | None) -> tuple[str, ...] | None:
        size = sum(len(name) + len('"",') for name in models or ())
        if size > MAX_MODELS_BYTES:
            raise ValueError(
                f"the list has {size} bytes as JSON; the limit is {MAX_MODELS_BYTES} bytes. List "
                "fewer models, or leave `models` out to allow all"
            )
        return models

    @property
    def budget(self) -> Budget:
        """Budget of this key alone."""
        return Budget(**self.model_dump(include=set(BUDGET_FIELDS)))

    @property
    def id(self) -> str:
        """Identifier of the key in lists."""
        return self.sha256[:ID_CHARS]


class KeyFileContents(Section):
    """A whole key file; a tenant without an entry has weight 1 and no limits."""

    tenants: dict[TenantName, TenantEntry] = Field(default_factory=dict)
    keys: tuple[KeyEntry, ...] = ()

    @model_validator(mode="after")
    def _check_unique(self) -> Self:
        digests = [key.sha256 for key in self.keys]
        if len(set(digests)) < len(digests):
            raise ValueError("a key is listed twice")
        return self

    def identities(self) -> dict[bytes, Identity]:
        """Return the identity of each key, by the key's digest."""
        names = {*self.tenants, *(key.tenant for key in self.keys)}
        tenants = {name: self.tenants.get(name, TenantEntry()).tenant(name) for name in names}
        return {
            bytes.fromhex(key.sha256): Identity(
                tenants[key.tenant],
                key.priority,
                None if key.models is None else frozenset(key.models),
                key=key.id,
                budget=key.budget,
                guards=self._guards_of(key),
            )
            for key in self.keys
        }

    def _guards_of(self, key: KeyEntry) -> frozenset[str] | None:
        guards = key.guards
        if guards is None and key.tenant in self.tenants:
            guards = self.tenants[key.tenant].guards
        return None if guards is None else frozenset(guards)

    def dump(self) -> str:
        """Return the file's text."""
        plain = self.model_dump(mode="json", exclude_defaults=True)
        text: str = yaml.dump(plain, Dumper=_DUMPER, sort_keys=False)
        return text


def parse_keys(text: str, where: str) -> KeyFileContents:
    """Parse a key file, YAML or JSON.

    Raises:
        ConfigError: the text is invalid; the message names ``where``, the field and the problem.
    """
    found = parse_yaml(text, where)
    try:
        return KeyFileContents.model_validate({} if found is None else found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = ".".join(str(part) for part in first["loc"]) or "the file"
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {path}: {reason[0].lower()}{reason[1:]}") from None


def bare_identities(
    digests: Iterable[str], *, is_operator: bool = False
) -> Mapping[bytes, Identity]:
    """Return identities for keys without a key file: one tenant per key, named by the key's id."""
    return {
        bytes.fromhex(digest): Identity(
            Tenant(digest[:ID_CHARS]), key=digest[:ID_CHARS], is_operator=is_operator
        )
        for digest in digests
    }


def new_key() -> str:
    """Return a new key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def digest(key: str) -> str:
    """Return the digest under which a key is stored."""
    return sha256(key.encode()).hexdigest()
