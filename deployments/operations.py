"""Changes of the key file, and reads of all logs, for the router's ``/v1/keys`` and ``/v1/logs``.

Both run in a task on the head: the key file is there, and so is Ray's dashboard, which has no TLS.
"""

import asyncio
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray

from cluster.config import RouterConfig
from cluster.config.file import KEY_FILE, key_file_path
from cluster.errors import (
    ConfigError,
    InvalidRequestError,
    OverloadedError,
    StartError,
    TandemError,
    UnavailableError,
    UnsupportedError,
)
from cluster.key_file import NewKey, add_key, copy_keys, list_keys, revoke_key
from cluster.launch.auth import ray_token
from cluster.launch.log_files import describe_logs, entries_for_request
from cluster.models.store import home
from cluster.ray_internals import (
    HEAD_NODE_RESOURCE_NAME,
    KEYS_KEY,
    kv_put,
    live_nodes,
    read_dashboard_address,
)

TIMEOUT_S = 120.0
"""Maximum duration of a task; a busy machine needs many seconds to start its process."""
GCS_TIMEOUT_S = 10.0
MAX_ENTRIES = 2000
"""Log entries of one request that are returned."""
KEY_MAY_EXIST = "The key may exist; see `tandem keys list`, and revoke it."


class _TaskLostError(UnavailableError):
    """The task on the head may have done its work, or a part of it."""


class HeadControl:
    """Access to the head; ``config`` returns the present configuration."""

    def __init__(self, config: Callable[[], RouterConfig]) -> None:
        self._config = config
        self._lock = asyncio.Lock()

    async def read_logs(self, request_id: str | None) -> dict[str, Any]:
        address = ray.get_runtime_context().gcs_address
        found: dict[str, Any] = await self._on_head(read_logs, address, request_id)
        return found

    async def list_keys(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await self._on_head(_list_keys, await self._key_file())
        return found

    async def add_key(self, new: NewKey, limits: Mapping[str, float | None]) -> str:
        file = await self._key_file()
        try:
            key: str = await self._on_head(_add_key, file, self._is_shared, new, dict(limits))
        except _TaskLostError as error:
            raise UnavailableError(f"{error} {KEY_MAY_EXIST}") from error
        return key

    async def revoke_key(self, key_id: str) -> tuple[str, str]:
        file = await self._key_file()
        id_, tenant = await self._on_head(_revoke_key, file, self._is_shared, key_id)
        return id_, tenant

    @property
    def _is_shared(self) -> bool:
        return self._config().keys_in_cluster

    async def _key_file(self) -> str | None:
        """Return the path of the key file; None for the one in the head's home.

        Raises:
            UnsupportedError: Each node has its own copy.
            UnavailableError: Ray does not answer.
        """
        if self._is_shared:
            return None
        try:
            nodes = await asyncio.to_thread(live_nodes, GCS_TIMEOUT_S)
        except Exception as error:  # Ray raises errors of several kinds
            raise UnavailableError(f"Ray's GCS does not answer: {error}") from error
        if len(nodes) > 1:
            raise UnsupportedError(
                "The keys are in a file on each node (router.keys_file); change that file."
            )
        return str(key_file_path(self._config()))

    async def _on_head(self, function: Callable[..., Any], *args: Any) -> Any:
        if self._lock.locked():
            raise OverloadedError("Another operation is in progress; try again.", retry_after_s=2)
        # The task returns our errors: Ray would wrap them.
        task = ray.remote(num_cpus=0, max_retries=0, resources={HEAD_NODE_RESOURCE_NAME: 0.001})
        async with self._lock:
            try:
                result, error = await _result(task(returning_errors).remote(function, *args))
            except TimeoutError:
                raise _TaskLostError(f"The head did not finish within {TIMEOUT_S:g} s.") from None
            except Exception as failure:
                raise _TaskLostError(f"The head does not answer: {failure!r}.") from failure
        if isinstance(error, ConfigError):
            raise InvalidRequestError(str(error))
        if error is not None:
            raise UnavailableError(str(error))
        return result


async def _result(ref: Any) -> Any:
    """Await the result of a task; cancel the task after TIMEOUT_S."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await ref
    except TimeoutError:
        ray.cancel(ref, force=True)  # or it would change the key file beside the next operation
        raise


def returning_errors(function: Callable[..., Any], *args: Any) -> tuple[Any, TandemError | None]:
    """Return the result of a call, or its error."""
    try:
        return function(*args), None
    except TandemError as error:
        return None, error


def read_logs(gcs_address: str, request_id: str | None) -> dict[str, Any]:
    """Return the overview of the logs of all nodes, or the entries of one request.

    Raises:
        StartError: The dashboard does not answer.
    """
    from cluster.launch.remote_logs import download_logs  # imports httpx, which routers need not

    address = read_dashboard_address(gcs_address, GCS_TIMEOUT_S)
    with tempfile.TemporaryDirectory(prefix="tandem-logs-") as scratch:
        root = Path(scratch)
        problems = download_logs(f"http://{address}", ray_token(os.environ), root)
        if request_id is None:
            return {**describe_logs(root), "problems": problems}
        entries = entries_for_request(root, request_id)
        return {
            "entries": [entry.as_dict(root) for entry in entries[:MAX_ENTRIES]],
            "truncated": len(entries) > MAX_ENTRIES,
            "problems": problems,
        }


def _path(file: str | None) -> Path:
    return home() / KEY_FILE if file is None else Path(file)


def _list_keys(file: str | None) -> list[dict[str, Any]]:
    return list_keys(_path(file))


def _add_key(
    file: str | None, is_shared: bool, new: NewKey, limits: Mapping[str, float | None]
) -> str:
    """Create a key; delete it again if the cluster does not store it, since its text is lost then.

    Raises:
        StartError: The cluster does not store the key.
    """
    path = _path(file)
    key = add_key(path, new, limits)
    if is_shared:
        try:
            _publish(path)
        except Exception as error:  # Ray's errors, and those of the file
            problem = f"The cluster did not store the new key: {error!r}."
            try:
                revoke_key(path, key)
            except Exception as second:
                raise StartError(f"{problem} {KEY_MAY_EXIST} ({second!r})") from error
            raise StartError(f"{problem} The key was deleted again.") from error
    return key


def _revoke_key(file: str | None, is_shared: bool, key_id: str) -> tuple[str, str]:
    try:
        return revoke_key(_path(file), key_id)
    finally:  # an earlier revocation may be in the file only
        if is_shared:
            _publish(_path(file))


def _publish(path: Path) -> None:
    copy_keys(path, lambda text: kv_put(KEYS_KEY, text, GCS_TIMEOUT_S))
