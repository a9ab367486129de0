"""Files that only the user can read."""

from pathlib import Path


def write_private(path: Path, text: str) -> None:
    """Replace a file by one that only the user can read.

    Raises:
        OSError: it cannot be written.
    """
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")
