"""Key file on disk: atomic writes, and reloads when it changes."""

import fcntl
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.admission import Identity
from cluster.admission.keys import KeyFileContents, TenantEntry, digest, new_key, parse_keys
from cluster.errors import ConfigError

logger = logging.getLogger("ray.serve.tandem")

Stamp = tuple[int, int, int]

LOCK_TIMEOUT_S = 10.0
"""Maximum wait for another process that changes the key file, in seconds."""


def read_keys(path: Path) -> KeyFileContents | None:
    """Read a key file; return None if it does not exist.

    Raises:
        ConfigError: the file cannot be read or is invalid.
    """
    try:
        return parse_keys(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


@contextmanager
def lock_keys(path: Path) -> Iterator[None]:
    """Keep other processes from changing a key file until the context ends.

    The lock is on a file next to it, because a write replaces the key file itself.

    Raises:
        ConfigError: another process holds the lock, or the lock file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be locked: {error}") from None
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{path}: another process has been changing it for {LOCK_TIMEOUT_S:g} s; retry"
                )
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_keys(path: Path, contents: KeyFileContents) -> None:
    """Replace a key file atomically; only its owner can read it.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}-", delete=False, encoding="utf-8"
        ) as temporary:
            temporary.write(contents.dump())
        os.replace(temporary.name, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from None


@dataclass(frozen=True, slots=True)
class NewKey:
    """Rights of a key that is created."""

    tenant: str
    priority: int
    models: list[str] | None
    """Models that it may use; None: all."""
    guards: list[str] | None
    """Guards that check its requests; None: those of the tenant."""
    key_cost_per_day: float | None = None
    """Budget of the key alone, in the configured currency."""
    key_cost_per_month: float | None = None

    def entry(self, sha256: str) -> dict[str, Any]:
        """Return the entry in the key file; a budget there has no prefix."""
        fields = asdict(self)
        budget = {name: fields.pop(f"key_{name}") for name in ("cost_per_day", "cost_per_month")}
        return {"sha256": sha256, **fields, **budget}


def add_key(path: Path, new: NewKey, limits: Mapping[str, float | None]) -> str:
    """Create a key and return it; the tenant keeps the limits that are None.

    Raises:
        ConfigError: a field is invalid, or the file cannot be changed.
    """
    key = new_key()
    with lock_keys(path):
        contents = (read_keys(path) or KeyFileContents()).model_dump(mode="json")
        limits_of_tenant = contents["tenants"].setdefault(new.tenant, {})
        limits_of_tenant |= {name: value for name, value in limits.items() if value is not None}
        contents["keys"].append(new.entry(digest(key)))
        write_keys(path, parse_keys(json.dumps(contents), "the new key"))
    return key


def list_keys(path: Path) -> list[dict[str, Any]]:
    """Return the rights of each key, with the limits of its tenant."""
    contents = read_keys(path) or KeyFileContents()
    return [
        {
            "id": key.id,
            "tenant": key.tenant,
            "priority": key.priority,
            "models": _listed(key.models),
            **(tenant := contents.tenants.get(key.tenant, TenantEntry())).model_dump(
                exclude={"soft_share"}
            ),
            "guards": _listed(tenant.guards if key.guards is None else key.guards),
            "key_cost_per_day": key.cost_per_day,
            "key_cost_per_month": key.cost_per_month,
        }
        for key in contents.keys
    ]


def _listed(names: tuple[str, ...] | None) -> list[str] | None:
    return None if names is None else list(names)


def revoke_key(path: Path, key_id: str) -> tuple[str, str]:
    """Delete a key, given by a prefix of its id or by the key itself; return id and tenant.

    Raises:
        ConfigError: no key, or more than one, matches.
    """
    sha256 = digest(key_id)
    with lock_keys(path):
        contents = read_keys(path) or KeyFileContents()
        matches = [k for k in contents.keys if k.sha256 == sha256 or k.sha256.startswith(key_id)]
        if not key_id or len(matches) != 1:
            known = ", ".join(key.id for key in contents.keys) or "none"
            found = "no key matches" if not matches else f"{len(matches)} keys match"
            raise ConfigError(f"{found} the id {key_id!r} in {path}; keys: {known}")
        remaining = tuple(key for key in contents.keys if key != matches[0])
        write_keys(path, KeyFileContents(tenants=contents.tenants, keys=remaining))
    return matches[0].id, matches[0].tenant


def copy_keys(path: Path, put: Callable[[bytes], None]) -> bool:
    """Store a key file's text elsewhere with ``put``; return False if the file does not exist.

    The lock is held meanwhile, so an old text cannot overwrite a newer one.

    Raises:
        ConfigError: another process holds the lock, or the file is invalid.
    """
    with lock_keys(path):
        contents = read_keys(path)
        if contents is not None:
            put(contents.dump().encode())
    return contents is not None


class KeyFile:
    """Key file that is reloaded when it changes.

    Until an ``expected`` file has been read, every request is rejected.
    """

    def __init__(self, path: Path, *, expected: bool) -> None:
        self._path = path
        self._stamp: Stamp | None = None
        self._logged_problem: Stamp | str | None = None
        self.identities: Mapping[bytes, Identity] = {}
        """Identities by key digest, from the last valid state of the file."""
        self.required = expected
        """True if requests need a key: also after the file became empty, invalid or missing."""

    @property
    def is_known(self) -> bool:
        """True once the file was read; until then, a missing key may exist."""
        return self._stamp is not None

    def refresh(self) -> bool:
        """Reload the file if it has changed; return True if the keys were replaced.

        An invalid or missing file leaves the keys unchanged, and is logged once.
        """
        try:
            info = os.stat(self._path)
        except OSError as error:
            if self.required:
                self._log_problem(str(error), error)
            return False
        stamp = (info.st_mtime_ns, info.st_size, info.st_ino)
        if stamp in (self._stamp, self._logged_problem):
            return False
        self.required = True
        try:
            contents = read_keys(self._path)
        except ConfigError as error:
            # Invalid contents stay so until the file changes; a failed read is tried again.
            is_transient = isinstance(error.__cause__, OSError)
            self._log_problem(str(error) if is_transient else stamp, error)
            return False
        if contents is None:  # deleted meanwhile
            return False
        self._stamp, self._logged_problem = stamp, None
        self.identities = contents.identities()
        logger.info("Loaded %s: %d API keys", self._path, len(self.identities))
        return True

    def _log_problem(self, cause: Stamp | str, error: Exception) -> None:
        if cause != self._logged_problem:
            self._logged_problem = cause
            logger.error("API keys remain unchanged: %s", error)


class ClusterKeys:
    """Keys that all routers of a cluster share; the same interface as ``KeyFile``.

    Every request is rejected until the cluster has answered.

    Args:
        read: Returns the text of the key file, or None; raises if the cluster does not answer.
        local: Key file of this node, used while the cluster has no keys.
    """

    def __init__(self, read: Callable[[], bytes | None], local: KeyFile | None) -> None:
        self.local = local
        self._read = read
        self._stored: bytes | None = None
        self._identities: Mapping[bytes, Identity] = {}
        self._has_answered, self._is_read = False, True

    @property
    def identities(self) -> Mapping[bytes, Identity]:
        """Identities by key digest."""
        return self.local.identities if self.local and self._uses_file else self._identities

    @property
    def required(self) -> bool:
        """True if requests need a key."""
        return (self.local is not None and self.local.required) if self._uses_file else True

    @property
    def is_known(self) -> bool:
        """True once the keys were read; until then, a missing key may exist."""
        return self.local.is_known if self.local and self._uses_file else self._has_answered

    @property
    def _uses_file(self) -> bool:
        return self._has_answered and self._stored is None

    def refresh(self) -> bool:
        """Read the keys; return True if they changed. If that fails, they remain unchanged."""
        is_changed = self._refresh_stored()
        return self.local.refresh() if self.local and self._uses_file else is_changed

    def _refresh_stored(self) -> bool:
        try:
            stored = self._read()
            is_changed = stored is not None and stored != self._stored
            if stored is not None and is_changed:
                self._identities = parse_keys(stored.decode(), "the cluster's keys").identities()
                self._stored = stored
                logger.info("Loaded %d API keys of the cluster", len(self._identities))
        except Exception as error:  # the GCS restarts, or another version wrote the keys
            if self._is_read:
                logger.error("API keys remain unchanged: %s", error)
            self._is_read = False
            return False
        self._has_answered = self._is_read = True
        return is_changed


KeySource = KeyFile | ClusterKeys
"""Keys that change while a router runs."""
