"""The key file on disk: written as a whole, and read again when it has changed."""

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cluster.admission import Identity
from cluster.admission.keys import KeyFileContents, parse_keys
from cluster.errors import ConfigError

logger = logging.getLogger("ray.serve.tandem")

Stamp = tuple[int, int, int]


def read_keys(path: Path) -> KeyFileContents | None:
    """What a key file says; None where there is none.

    Raises:
        ConfigError: it cannot be read, or is wrong.
    """
    try:
        return parse_keys(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def write_keys(path: Path, contents: KeyFileContents) -> None:
    """Replace a key file at once, readable by its owner alone.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}-", delete=False, encoding="utf-8"
        ) as fresh:
            fresh.write(contents.dump())
        os.replace(fresh.name, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from None


class KeyFile:
    """A key file that is read again whenever it has changed.

    Args:
        path: Where it lies.
        expected: Whether it must be there; where it is not, no key is known and one is needed.
    """

    def __init__(self, path: Path, *, expected: bool) -> None:
        self._path = path
        self._stamp: Stamp | None = None
        self._complained: Stamp | str | None = None
        self.identities: Mapping[bytes, Identity] = {}
        """Of the last state of the file that was right."""
        self.seen = expected
        """Whether keys are needed: also after the file was emptied, broken or deleted."""

    def refresh(self) -> bool:
        """Read the file if it has changed; whether there are other keys now.

        A file that is wrong or gone leaves the keys as they are; the log says so once.
        """
        try:
            found = os.stat(self._path)
        except OSError as error:
            if self.seen:
                self._complain(str(error), error)
            return False
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        if stamp in (self._stamp, self._complained):
            return False
        self.seen = True
        try:
            contents = read_keys(self._path)
        except ConfigError as error:
            self._complain(stamp, error)
            return False
        if contents is None:  # deleted since
            return False
        self._stamp, self._complained = stamp, None
        self.identities = contents.identities()
        logger.info("%s: %d API keys", self._path, len(self.identities))
        return True

    def _complain(self, cause: Stamp | str, error: Exception) -> None:
        if cause != self._complained:
            self._complained = cause
            logger.error("the API keys stay as they were: %s", error)
