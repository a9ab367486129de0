"""Ray's own token, for clusters whose user has set ``RAY_AUTH_MODE=token``."""

from collections.abc import Mapping
from pathlib import Path


def ray_token(environment: Mapping[str, str]) -> str | None:
    """The token that Ray itself would take from ``environment``; None without token mode."""
    if environment.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    if token := environment.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
