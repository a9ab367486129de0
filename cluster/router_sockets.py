"""Unix sockets of the routers, by which HAProxy reaches those of its node.

A write and a read of a token take 2.4 us of CPU by a Unix socket, and 7.6 us by TCP. HAProxy sends
API keys and prompts to these sockets, so they are in a directory where only this user can create
one.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path


def router_socket(directory: str, port: int) -> str:
    """Return the path of the socket of the router with this HTTP port."""
    # Serve's template has HOST:PORT, and HAProxy takes all after `unix@` for the path.
    return os.path.join(directory, f"router:{port}")


def open_router_socket(directory: str, port: int) -> socket.socket:
    """Bind a router's socket, which replaces that of a dead router with the same port.

    Raises:
        OSError: the directory is not private, or the socket cannot be created.
    """
    check_private, _ = socket_checks()
    Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(directory)
    path = router_socket(directory, port)
    Path(path).unlink(missing_ok=True)
    opened = socket.socket(socket.AF_UNIX)
    try:
        opened.bind(path)
    except BaseException:
        opened.close()
        raise
    return opened


def socket_checks() -> tuple[Callable[[str], None], Callable[[str], bool]]:
    """Return two functions for directories and sockets.

    The first one raises PermissionError unless only this user and root can create, replace and
    rename files in a directory. The second one returns True if a process listens on the socket with
    this path and its directory is private.

    They are pickled by value with the function that uses them, which
    ``haproxy_internals.proxy_setup`` returns.
    """

    def check_private(directory: str) -> None:
        import os
        import stat
        from pathlib import Path

        for path in (Path(directory), *Path(directory).parents):
            info = os.lstat(path)  # a link's owner could change its target
            is_shared = bool(info.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
            if str(path) != directory and info.st_mode & stat.S_ISVTX:
                is_shared = False  # as in /tmp, others cannot rename what this user owns
            is_ours = stat.S_ISDIR(info.st_mode) and info.st_uid in (0, os.getuid())
            if is_shared or not is_ours:
                raise PermissionError(f"other users can replace files in {path}")

    def is_usable(path: str) -> bool:
        import os
        import socket

        try:
            check_private(os.path.dirname(path))
            with socket.socket(socket.AF_UNIX) as probe:
                probe.setblocking(False)
                probe.connect(path)
        except OSError:
            return False
        return True

    return check_private, is_usable
