"""API keys: who may use the router, and as whom."""

from collections.abc import Iterable, Mapping
from hashlib import sha256

from cluster.admission import OPEN, Identity
from cluster.admission.keys import bare_identities
from cluster.errors import AuthenticationError
from cluster.gateway.messages import Headers, header
from cluster.key_file import KeyFile


class Authenticator:
    """Finds whom a request comes from, by the hash of its API key.

    Args:
        key_hashes: Of keys without a file; each is a tenant of its own.
        file: Further keys, read again when they change.
    """

    def __init__(self, key_hashes: Iterable[str], file: KeyFile | None = None) -> None:
        self._bare = bare_identities(key_hashes)
        self._file = file
        self._identities: Mapping[bytes, Identity] = self._bare
        self.refresh()

    def refresh(self) -> bool:
        """Look at the key file; whether there are other keys now."""
        changed = self._file is not None and self._file.refresh()
        if changed and self._file is not None:
            self._identities = {**self._bare, **self._file.identities}
        return changed

    @property
    def identities(self) -> Iterable[Identity]:
        """Everybody who has a key."""
        return self._identities.values()

    def check(self, headers: Headers) -> Identity:
        """Whose request this is; ``OPEN`` where no keys are configured, and each may pass.

        Raises:
            AuthenticationError: there is no key, or it is not known.
        """
        if not self._bare and (self._file is None or not self._file.required):
            return OPEN
        key = _key(headers)
        if key is None:
            raise AuthenticationError(
                "An API key is needed: 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
            )
        identity = self._identities.get(sha256(key.encode()).digest())
        if identity is None:
            raise AuthenticationError("The API key is not known.")
        return identity


def _key(headers: Headers) -> str | None:
    if given := header(headers, b"x-api-key"):
        return given
    scheme, _, key = (header(headers, b"authorization") or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None
