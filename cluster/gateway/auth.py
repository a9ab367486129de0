"""API keys: who may use the router."""

from collections.abc import Iterable
from hashlib import sha256

from cluster.errors import AuthenticationError
from cluster.gateway.messages import Headers, header


class Authenticator:
    """Checks a request's API key against the hashes of those that are known.

    Comparing SHA-256 digests of high-entropy keys in a set leaks nothing useful through timing:
    an attacker cannot steer the digest of a guess.
    """

    def __init__(self, key_hashes: Iterable[str]) -> None:
        self._hashes = frozenset(bytes.fromhex(digest) for digest in key_hashes)

    def check(self, headers: Headers) -> str:
        """Whose request this is, by its key; "" where no keys are configured, and each may pass.

        Raises:
            AuthenticationError: there is no key, or it is not known.
        """
        if not self._hashes:
            return ""
        key = _key(headers)
        if key is None:
            raise AuthenticationError(
                "An API key is needed: 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
            )
        digest = sha256(key.encode())
        if digest.digest() not in self._hashes:
            raise AuthenticationError("The API key is not known.")
        return digest.hexdigest()[:16]


def _key(headers: Headers) -> str | None:
    if given := header(headers, b"x-api-key"):
        return given
    scheme, _, key = (header(headers, b"authorization") or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None
