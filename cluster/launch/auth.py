"""Ray's authentication token: from the environment, or from Tandem's home.

In a cluster of several nodes, Ray and its dashboard require the token in ``<home>/ray-token`` of
each node, because anyone who can connect to them can run code.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path

from cluster.errors import StartError
from cluster.launch.private_files import write_private

MODE = "RAY_AUTH_MODE"
TOKEN = "RAY_AUTH_TOKEN"
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
TOKEN_BYTES = 32


def token_file(home: Path) -> Path:
    return home / "ray-token"


def ray_token(environment: Mapping[str, str], home: Path | None = None) -> str | None:
    """Return the token of ``environment``, or else of ``home``; None without one.

    Like Ray, this reads the environment's token with RAY_AUTH_MODE=token only.
    """
    is_on = environment.get(MODE, "").lower() == "token"
    if is_on and (token := environment.get(TOKEN)):
        return token
    if is_on and (path := environment.get(TOKEN_PATH)):
        return _read(Path(path).expanduser())
    if home is not None and (token := _read(token_file(home))):
        return token
    return _read(Path("~/.ray/auth_token").expanduser()) if is_on else None


def stored_token(home: Path) -> str | None:
    """Return the token of a cluster of several nodes; None without one."""
    return _read(token_file(home))


def token_variables(home: Path) -> dict[str, str]:
    """Return the variables with which Ray requires the token in ``home``."""
    return {MODE: "token", TOKEN_PATH: str(token_file(home))}


def store_token(environment: Mapping[str, str], home: Path, file: Path | None = None) -> bool:
    """Store the token in ``home``: from ``file``, or else from the environment.

    Without both, a token that is stored already stays. Returns False without any token.

    Raises:
        StartError: ``file`` has no token, or the token cannot be stored.
    """
    token = ray_token({**environment, MODE: "token"}, home)
    if file is not None and (token := _read(file)) is None:
        raise StartError(f"{file} does not exist or contains no token")
    if token is None:
        return False
    if token != _read(token_file(home)):
        _write(token_file(home), token)
    return True


def create_token(home: Path) -> None:
    """Store a new token in ``home``."""
    _write(token_file(home), secrets.token_hex(TOKEN_BYTES))


def _write(path: Path, token: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private(path, f"{token}\n")
    except OSError as error:
        raise StartError(f"{path} cannot be written: {error.strerror}") from None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
