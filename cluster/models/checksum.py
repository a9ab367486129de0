"""Checksum of a model's weight files, by which replicas on several nodes are compared."""

import hashlib
from pathlib import Path

from cluster.models.store import resolve

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def weights_checksum(model: str) -> str:
    """Return the SHA-256 of a model's weight files and their names; empty if there are none here.

    Reads all of them, about 1 GB per second and core.

    Raises:
        ConfigError: the model does not exist on this machine.
    """
    directory = _directory(resolve(model))
    if directory is None:
        return ""
    files = sorted({path for pattern in _WEIGHTS for path in directory.glob(pattern)})
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        digest.update(path.name.encode() + b"\0" + content)
    return digest.hexdigest() if files else ""


def _directory(resolved: str) -> Path | None:
    path = Path(resolved)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(resolved, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
