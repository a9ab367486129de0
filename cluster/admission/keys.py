"""API keys and tenants, as a key file describes them. Pure: text in, text out.

Keys are kept as SHA-256 digests. They are random and long, so a slow hash would protect nothing
more, and comparing digests in a mapping leaks nothing useful through timing: an attacker cannot
steer the digest of a guess.
"""

import secrets
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.admission.identity import (
    MAX_PRIORITY,
    MIN_PRIORITY,
    Identity,
    Tenant,
    TenantLimits,
)
from cluster.errors import ConfigError

KEY_PREFIX = "tnd-"
ID_CHARS = 16
"""Of its digest, by which a key is named where the key itself must not be seen."""
_KEY_BYTES = 32

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Limit = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TenantEntry(_Section):
    """A tenant in a key file; a limit that is left out is none."""

    weight: float = Field(1.0, ge=0, le=1e6, allow_inf_nan=False)
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    max_ongoing: int | None = Field(None, ge=1)
    tokens_per_day: Limit | None = None

    def tenant(self, name: str) -> Tenant:
        """The tenant of this name."""
        limits = self.model_dump(exclude={"weight"})
        return Tenant(name, self.weight, TenantLimits(**limits))


class KeyEntry(_Section):
    """A key in a key file."""

    sha256: Digest
    tenant: Name
    priority: int = Field(0, ge=MIN_PRIORITY, le=MAX_PRIORITY)
    models: tuple[Name, ...] | None = None
    """The models that it may use; left out: every one."""

    @property
    def id(self) -> str:
        """What it is called in lists."""
        return self.sha256[:ID_CHARS]


class KeyFileContents(_Section):
    """A whole key file. A tenant that is not described has weight 1 and no limit."""

    tenants: dict[Name, TenantEntry] = {}
    keys: tuple[KeyEntry, ...] = ()

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        digests = [key.sha256 for key in self.keys]
        if len(set(digests)) < len(digests):
            raise ValueError("each key may stand once")
        return self

    def identities(self) -> dict[bytes, Identity]:
        """Whom each key belongs to, by the key's digest."""
        names = {*self.tenants, *(key.tenant for key in self.keys)}
        tenants = {name: self.tenants.get(name, TenantEntry()).tenant(name) for name in names}
        return {
            bytes.fromhex(key.sha256): Identity(
                tenants[key.tenant],
                key.priority,
                None if key.models is None else frozenset(key.models),
            )
            for key in self.keys
        }

    def dump(self) -> str:
        """The file's text."""
        plain = self.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(plain, sort_keys=False)


def parse_keys(text: str, where: str) -> KeyFileContents:
    """A key file's contents; JSON is YAML too.

    Raises:
        ConfigError: one line that names ``where``, the field and what is wrong.
    """
    try:
        found: Any = yaml.safe_load(text)
        return KeyFileContents.model_validate({} if found is None else found)
    except yaml.YAMLError as error:
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise ConfigError(f"{where}: not valid YAML: {problem}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = ".".join(str(part) for part in first["loc"]) or "the file"
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {path}: {reason[0].lower()}{reason[1:]}") from None


def bare_identities(digests: Iterable[str]) -> Mapping[bytes, Identity]:
    """Of keys without a file: each is a tenant of its own, named by its digest's beginning."""
    return {bytes.fromhex(digest): Identity(Tenant(digest[:ID_CHARS])) for digest in digests}


def new_key() -> str:
    """A key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def digest(key: str) -> str:
    """Under what a key is kept."""
    return sha256(key.encode()).hexdigest()
