"""Division of requests between two versions of a model, the same at every router."""

from hashlib import blake2b

_RANGE = 2.0**64


def takes_candidate(version: str, key: str, share: float) -> bool:
    """Return True if the new version answers requests with this key.

    A session keeps its version while the share grows, since its position does not change. The
    version is part of the hash, so that each rollout begins with other sessions.

    Args:
        version: Name of the new version.
        key: Session, or id of a request without one.
        share: Percentage of the keys that the new version gets.
    """
    digest = blake2b(f"{version}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / _RANGE * 100 < share
