"""Sockets between HAProxy and routers: others cannot offer one."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.router_sockets import open_router_socket, router_socket, socket_checks

check_private, is_usable = socket_checks()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Private directory in a private one."""
    path = tmp_path / "haproxy" / "node"
    path.mkdir(parents=True)
    for each in (path, path.parent):
        each.chmod(0o755)
    return path


@pytest.fixture
def listening(directory: Path) -> Iterator[str]:
    with open_router_socket(str(directory), 1) as opened:
        opened.listen()
        yield router_socket(str(directory), 1)


def test_a_socket_in_a_private_directory_is_used(listening: str) -> None:
    assert is_usable(listening)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_no_socket_is_used_where_others_can_create_one(
    listening: str, directory: Path, mode: int
) -> None:
    directory.chmod(mode)
    assert not is_usable(listening)
    with pytest.raises(PermissionError, match="other users"):
        open_router_socket(str(directory), 2)


def test_no_socket_is_used_if_others_can_replace_its_directory(
    listening: str, directory: Path
) -> None:
    directory.parent.chmod(0o777)
    assert not is_usable(listening)
    directory.parent.chmod(0o1777)  # as /tmp
    assert is_usable(listening)


def test_no_socket_of_another_user_is_used(listening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user created the directory first, with a socket in it."""
    lstat = os.lstat

    def foreign(path: str | Path) -> os.stat_result:
        values = list(lstat(path))
        values[4] = 12345  # user id
        return os.stat_result(values)

    monkeypatch.setattr(os, "lstat", foreign)
    assert not is_usable(listening)
    with pytest.raises(PermissionError, match="other users"):
        check_private(os.path.dirname(listening))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory to another user")
def test_a_directory_of_another_user_is_not_used(listening: str, directory: Path) -> None:
    os.chown(directory.parent, 12345, 12345)
    assert not is_usable(listening)


def test_a_link_to_a_directory_is_not_used(listening: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(os.path.dirname(listening))
    assert not is_usable(str(tmp_path / "link" / "router:1"))


def test_the_socket_of_a_dead_router_is_not_used_and_is_replaced(directory: Path) -> None:
    path = router_socket(str(directory), 1)
    assert not is_usable(path)
    open_router_socket(str(directory), 1).close()
    assert Path(path).exists()
    assert not is_usable(path)
    with open_router_socket(str(directory), 1) as opened:
        opened.listen()
        assert is_usable(path)


def test_the_directory_is_created_for_this_user_only(tmp_path: Path) -> None:
    with open_router_socket(str(tmp_path / "node"), 1):
        assert (tmp_path / "node").stat().st_mode & 0o777 == 0o700


def test_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    long = str(tmp_path / ("n" * 100))
    with pytest.raises(OSError, match="too long"):
        open_router_socket(long, 1)
    assert not is_usable(router_socket(long, 1))


def test_a_router_that_does_not_accept_is_not_waited_for(directory: Path) -> None:
    path = router_socket(str(directory), 1)
    with open_router_socket(str(directory), 1) as opened:
        opened.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(path)
            assert not is_usable(path)
