"""Authentication by API key."""

from collections.abc import Iterable, Mapping
from hashlib import sha256

from cluster.admission import OPEN, Identity
from cluster.admission.keys import bare_identities
from cluster.errors import AuthenticationError
from cluster.gateway.messages import Headers, header
from cluster.key_file import KeyFile


class Authenticator:
    """Lookup of a request's sender by the digest of its API key.

    Args:
        key_hashes: SHA-256 digests (hex) of keys without limits; each forms its own tenant.
        file: Further keys, reloaded when the file changes.
    """

    def __init__(self, key_hashes: Iterable[str], file: KeyFile | None = None) -> None:
        self._bare = bare_identities(key_hashes)
        self._file = file
        self._identities: Mapping[bytes, Identity] = self._bare
        self.refresh()

    def refresh(self) -> bool:
        """Reload the key file if it changed; return True if it did."""
        if self._file is None or not self._file.refresh():
            return False
        self._identities = {**self._bare, **self._file.identities}
        return True

    @property
    def identities(self) -> Iterable[Identity]:
        """Identities of all keys."""
        return self._identities.values()

    def authenticate(self, headers: Headers) -> Identity:
        """Return the sender of a request; ``OPEN`` if no keys are configured.

        Raises:
            AuthenticationError: The API key is missing or unknown.
        """
        if not self._bare and (self._file is None or not self._file.required):
            return OPEN
        key = _api_key(headers)
        if key is None:
            raise AuthenticationError(
                "Missing API key; send 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
            )
        identity = self._identities.get(sha256(key.encode()).digest())
        if identity is None:
            raise AuthenticationError("Unknown API key.")
        return identity


def _api_key(headers: Headers) -> str | None:
    if key := header(headers, b"x-api-key"):
        return key
    scheme, _, key = (header(headers, b"authorization") or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None
