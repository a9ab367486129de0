"""Redis that keeps the state of the head: its URL, and the check before the start."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cluster.config import ClusterConfig
from cluster.errors import ConfigError, StartError
from cluster.launch.redis import Redis, check_redis, parse_redis
from cluster.launch.starter import check_version
from cluster.launch.starter_process import head_params


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://10.0.0.9", Redis("10.0.0.9", 6379, "", "", "tandem")),
        ("redis://:a%20b@r:6380/prod-1", Redis("r", 6380, "", "a b", "prod-1")),
        ("redis://me:p%40w@r/", Redis("r", 6379, "me", "p@w", "tandem")),
    ],
)
def test_a_url_names_server_password_and_cluster(url: str, expected: Redis) -> None:
    assert parse_redis(url) == expected


@pytest.mark.parametrize(
    "url", ["r:6379", "rediss://r", "redis://", "redis://:secret@r:port", "redis://:secret@r/a/b"]
)
def test_an_invalid_url_is_rejected_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match="--redis: expected redis://") as caught:
        parse_redis(url)
    assert "secret" not in str(caught.value)


def test_the_head_gets_address_password_and_namespace() -> None:
    redis = parse_redis("redis://:secret@r:6380/prod")
    params = head_params(ClusterConfig(), "10.0.0.1", redis)
    assert params["external_addresses"] == ["r:6380", "r:6380"]
    assert params["redis_password"] == "secret"
    found = redis.add_variables({"RAY_gcs_rpc_server_reconnect_timeout_s": "30"})
    assert found["RAY_external_storage_namespace"] == "prod"
    assert found["RAY_gcs_rpc_server_reconnect_timeout_s"] == "30"
    assert redis.add_variables({})["RAY_gcs_rpc_server_reconnect_timeout_s"] == "600"


@contextmanager
def answering(*answers: bytes) -> Iterator[tuple[Redis, list[bytes]]]:
    """Answer the commands of one connection, which are appended to the list that is yielded."""
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                for each in answers:
                    received.append(connection.recv(1000))
                    connection.sendall(each)

        thread = threading.Thread(target=answer)
        thread.start()
        yield Redis("127.0.0.1", server.getsockname()[1], "", "a b", "tandem"), received
        thread.join()


def test_the_check_authenticates() -> None:
    with answering(b"+OK\r\n", b"+PONG\r\n") as (redis, received):
        check_redis(redis)
    assert received == [b"*2\r\n$4\r\nAUTH\r\n$3\r\na b\r\n", b"*1\r\n$4\r\nPING\r\n"]


def test_a_wrong_password_and_a_closed_port_are_named() -> None:
    with (
        answering(b"-WRONGPASS invalid password\r\n") as (redis, _),
        pytest.raises(StartError, match="refuses AUTH: WRONGPASS invalid password"),
    ):
        check_redis(redis)
    with pytest.raises(StartError, match=r"does not respond at 127\.0\.0\.1:1: "):
        check_redis(Redis("127.0.0.1", 1, "", "", "tandem"))


def test_a_head_of_another_version_does_not_take_over() -> None:
    check_version("1.2.0", "1.2.0")
    with pytest.raises(ValueError, match=r"Tandem 1\.1\.0, this is 1\.2\.0"):
        check_version("1.1.0", "1.2.0")
