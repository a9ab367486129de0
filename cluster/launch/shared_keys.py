"""API keys of a cluster of several nodes: copied from the head's key file to the cluster."""

import os
from pathlib import Path

from cluster.config.file import KEY_FILE
from cluster.errors import ConfigError, StartError
from cluster.key_file import copy_keys
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
        head = known.ray_address.rpartition(":")[0]
        raise ConfigError(
            f"this node joined a cluster, whose keys are on its head; run `tandem keys` on {head}"
        )
    if known.address is not None:
        os.environ.pop(auth.TOKEN, None)  # Ray prefers it to the file
        os.environ.update(auth.token_variables(home))


def is_key_file_of(home: Path, path: Path) -> bool:
    """Return True if this is the key file that a cluster of this home copies."""
    return path.resolve() == (home / KEY_FILE).resolve()


def publish_keys(home: Path, path: Path) -> bool:
    """Copy the key file to the running cluster; return False if it takes no keys from there.

    Raises:
        ConfigError: the file is invalid, or another process is changing it.
        StartError: the cluster does not answer.
    """
    known = state.load(home)
    if known is None or not known.keys_in_cluster or not is_key_file_of(home, path):
        return False
    if not processes.find(home):
        return False
    from cluster.ray_internals import KEYS_KEY, write_remote_kv

    def put(text: bytes) -> None:
        try:
            write_remote_kv(known.ray_address, KEYS_KEY, text, TIMEOUT_S)
        except Exception as error:  # Ray's errors, and gRPC's
            raise StartError(
                f"the cluster did not store the keys of {path}, so its routers still use the "
                f"previous ones: {error!r}. Run `tandem keys publish` once it responds."
            ) from None

    return copy_keys(path, put)
