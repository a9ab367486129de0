"""The secret that both ends of a link must know: made once for each cluster, kept in its GCS.

Whoever can read it can talk to the cluster's control plane anyway; ``RAY_AUTH_MODE=token``
closes that to others.
"""

import secrets

from ray.experimental import internal_kv

_KEY = b"link-secret"
_NAMESPACE = b"tandem"


def link_secret() -> bytes:
    """The cluster's secret of 32 bytes; the first caller makes it."""
    # GCS takes the first of several writers; all of them then read the same value.
    internal_kv._internal_kv_put(
        _KEY, secrets.token_bytes(32), overwrite=False, namespace=_NAMESPACE
    )
    secret = internal_kv._internal_kv_get(_KEY, namespace=_NAMESPACE)
    if not isinstance(secret, bytes) or len(secret) != 32:
        raise RuntimeError("the cluster's link secret could not be read from GCS")
    return secret
