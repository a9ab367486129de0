"""Authentication by API key."""

import logging
from collections.abc import Iterable, Mapping
from hashlib import sha256
from itertools import chain

from cluster.admission import OPEN, Identity, Tenant
from cluster.admission.keys import bare_identities
from cluster.config import RouterConfig
from cluster.errors import AuthenticationError, UnavailableError
from cluster.gateway.messages import Headers, header
from cluster.key_file import KeySource

logger = logging.getLogger("ray.serve.tandem")

NO_KEYS = (
    "The cluster's HTTP is reachable from other machines, but no API keys are configured. Add a "
    "key (`tandem keys add TENANT`, router.keys_file or router.api_keys_sha256), bind "
    "http_options.host to loopback, or set router.open to true to accept every request."
)


class Authenticator:
    """Lookup of a request's sender by the digest of its API key.

    Args:
        key_hashes: SHA-256 digests (hex) of keys without limits; each forms its own tenant.
        file: Further keys, reloaded when the file or the cluster's keys change.
        operator_hashes: Digests of keys that may also see the figures of every tenant.
        needs_keys: True if every request is rejected while no keys are configured.
    """

    def __init__(
        self,
        key_hashes: Iterable[str],
        file: KeySource | None = None,
        *,
        operator_hashes: Iterable[str] = (),
        needs_keys: bool = False,
    ) -> None:
        self._needs_keys = needs_keys
        self._file = file
        self._set_hashes(key_hashes, operator_hashes)
        self.refresh()
        if needs_keys and not self._has_keys:
            logger.error("This router rejects every request. %s", NO_KEYS)

    def reconfigure(
        self, router: RouterConfig, file: KeySource | None, *, needs_keys: bool
    ) -> None:
        """Replace all keys at once.

        Args:
            router: Section with the digests of keys.
            file: Key file, already read.
            needs_keys: See the class.
        """
        self._file, self._needs_keys = file, needs_keys
        self._set_hashes(router.api_keys_sha256, router.operator_keys_sha256)

    def _set_hashes(self, key_hashes: Iterable[str], operator_hashes: Iterable[str]) -> None:
        self._operators = bare_identities(operator_hashes, is_operator=True)
        self._bare = {**bare_identities(key_hashes), **self._operators}

    def refresh(self) -> bool:
        """Reload the key file if it changed; return True if it did."""
        return self._file is not None and self._file.refresh()

    @property
    def identities(self) -> Iterable[Identity]:
        """Identities of all keys."""
        return [*{**self._bare, **self._from_file, **self._operators}.values()]

    @property
    def _from_file(self) -> Mapping[bytes, Identity]:
        return self._file.identities if self._file is not None else {}

    @property
    def _sources(self) -> tuple[Mapping[bytes, Identity], ...]:
        """Keys in order of precedence."""
        # An entry of the file names a tenant and limits, so it overrides a bare digest.
        return self._operators, self._from_file, self._bare

    @property
    def _has_keys(self) -> bool:
        return bool(self._bare) or (self._file is not None and self._file.required)

    def find_identity(self, tenant: str, key: str) -> Identity:
        """Return the present rights of a key, by its id, for work that it began earlier.

        Raises:
            UnavailableError: The keys are not known yet.
            AuthenticationError: The key was revoked.
        """
        if not tenant:  # begun inside the cluster, or when no key was required
            return OPEN
        if not self._has_keys and not self._needs_keys:
            return Identity(Tenant(tenant))
        for identity in chain(*(each.values() for each in self._sources)):
            if (identity.tenant.name, identity.key) == (tenant, key):
                return identity
        if self._file is not None and self._file.required and not self._file.is_known:
            raise UnavailableError("The API keys are not known yet.", retry_after_s=1)
        raise AuthenticationError("The API key that began this work was revoked.")

    def authenticate(self, headers: Headers) -> Identity:
        """Return the sender of a request; ``OPEN`` if no keys are configured.

        Raises:
            AuthenticationError: The API key is missing or unknown.
        """
        if not self._has_keys:
            if self._needs_keys:
                raise AuthenticationError(NO_KEYS)
            return OPEN
        key = _api_key(headers)
        if key is None:
            raise AuthenticationError(
                "Missing API key; send 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
            )
        digest = sha256(key.encode()).digest()
        identity = next((found for each in self._sources if (found := each.get(digest))), None)
        if identity is None:
            raise AuthenticationError("Unknown API key.")
        return identity


def _api_key(headers: Headers) -> str | None:
    if key := header(headers, b"x-api-key"):
        return key
    scheme, _, key = (header(headers, b"authorization") or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None
