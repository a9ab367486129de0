"""Redis in which the GCS keeps its state, so that a restarted head finds its cluster again."""

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from cluster.errors import ConfigError, StartError

DEFAULT_PORT = 6379
DEFAULT_NAMESPACE = "tandem"
NAMESPACE_VARIABLE = "RAY_external_storage_namespace"
RECONNECT_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"
HEAD_TIMEOUT_S = 600
"""Time for which the other nodes wait for the head, in seconds; Ray's default is 60."""
TIMEOUT_S = 5.0
"""Maximum duration of the check before the start, in seconds."""
FORM = "redis://[[USER]:PASSWORD@]HOST[:PORT][/NAME]"


@dataclass(frozen=True, slots=True)
class Redis:
    """A Redis server, and the name of the cluster in it."""

    host: str
    port: int
    user: str
    password: str
    namespace: str
    """Prefix of the keys; clusters that share a server need different ones."""

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def ray_params(self) -> dict[str, Any]:
        """Return fields of Ray's ``RayParams`` for a head."""
        return {
            "external_addresses": [self.address] * 2,  # Ray expects a "shard", also if it is one
            "num_redis_shards": 1,
            "redis_username": self.user,
            "redis_password": self.password,
        }

    def add_variables(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of the head's processes."""
        defaults = {RECONNECT_VARIABLE: str(HEAD_TIMEOUT_S)}
        return {**defaults, **environment, NAMESPACE_VARIABLE: self.namespace}


def parse_redis(url: str) -> Redis:
    """Parse the value of ``--redis``.

    Raises:
        ConfigError: it has another form; the password is not quoted.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:
        host, port = None, 0
    namespace = parts.path.strip("/") if host else ""
    if not host or parts.scheme != "redis" or not re.fullmatch(r"[\w-]*", namespace):
        raise ConfigError(f"--redis: expected {FORM}. NAME may have letters, digits, - and _.")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return Redis(host, port, user, password, namespace or DEFAULT_NAMESPACE)


def check_redis(redis: Redis) -> None:
    """Connect as Ray will, which would try for minutes.

    Raises:
        StartError: Redis does not answer, or rejects the user or password.
    """
    commands: list[Sequence[str]] = [("PING",)]
    if redis.password:
        commands.insert(0, ("AUTH", *filter(None, (redis.user, redis.password))))
    try:
        with (
            socket.create_connection((redis.host, redis.port), TIMEOUT_S) as connection,
            connection.makefile("rwb") as stream,
        ):
            for command in commands:
                words = [word.encode() for word in command]
                stream.write(b"*%d\r\n" % len(words))
                stream.writelines(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
                stream.flush()
                answer = stream.readline().decode(errors="replace").strip()
                if not answer.startswith("+"):
                    text = answer.removeprefix("-") or "it closed the connection"
                    raise StartError(f"Redis at {redis.address} refuses {command[0]}: {text}")
    except OSError as error:
        raise StartError(
            f"Redis does not respond at {redis.address}: {error.strerror or error}"
        ) from None


def delete_cluster(redis: Redis) -> None:
    """Delete the state of a cluster whose head has stopped.

    This does not end nodes that joined; they wait for the head for up to HEAD_TIMEOUT_S.

    Raises:
        StartError: Redis does not answer.
    """
    check_redis(redis)
    from cluster.ray_internals import cleanup_redis_storage

    cleanup_redis_storage(
        redis.host,
        redis.port,
        redis.password,
        use_ssl=False,
        storage_namespace=redis.namespace,
        username=redis.user,
    )
