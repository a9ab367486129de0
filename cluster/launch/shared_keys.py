"""API keys of a cluster of several nodes: copied from the head's key file to the cluster."""

import os
from pathlib import Path

from cluster.errors import ConfigError, StartError
from cluster.key_file import read_keys
from cluster.launch import auth, processes, state

TIMEOUT_S = 10.0


def prepare(home: Path) -> None:
    """Let Ray find the token of the cluster; call this before anything imports Ray.

    Raises:
        ConfigError: this node joined a cluster, whose keys are on its head.
    """
    known = state.load(home)
    if known is None:
        return
    if not known.is_head:
        raise ConfigError(f"this node joined a cluster; run `tandem keys` on {known.ray_address}")
    if known.address is not None:
        os.environ.update(auth.token_variables(home))


def publish_keys(home: Path, path: Path) -> bool:
    """Let all routers of the running cluster use the key file; False if no cluster needs it.

    Raises:
        StartError: the cluster does not answer.
    """
    known = state.load(home)
    if known is None or known.address is None or not processes.find(home):
        return False
    contents = read_keys(path)
    if contents is None:
        return False
    from cluster.ray_internals import KEYS_KEY, write_remote_kv

    try:
        write_remote_kv(known.ray_address, KEYS_KEY, contents.dump().encode(), TIMEOUT_S)
    except Exception as error:  # Ray's errors, and gRPC's
        raise StartError(
            f"{path} was changed, but the cluster did not store it: {error!r}"
        ) from None
    return True
