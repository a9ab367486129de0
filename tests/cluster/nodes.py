"""Several nodes on one machine: network namespaces that are connected by a bridge.

Nodes share the file system and process ids, so each has its own Tandem home and Ray directory.
"""

import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

from cluster.launch import processes
from cluster.launch.redis import parse_redis
from cluster.models import store
from tests import running
from tests.certificates import certificates
from tests.running import ROOT, TANDEM

HTTP_PORT = 8000
RAY_PORT = 6379
OPERATOR_KEY = "operator"
OPERATOR_SHA256 = "06e55b633481f7bb072957eabcf110c972e86691c3cfedabe088024bffe42f23"
START_TIMEOUT_S = 240.0
"""Maximum duration of a start, in seconds; it takes 30 on two idle cores."""


def can_connect(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), 1.0):
        return True
    return False


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@dataclass
class Node:
    """A node, not necessarily started; ``address`` is reachable from the test."""

    name: str
    """Name of the network namespace."""
    address: str
    home: Path
    port: str
    """Network interface on the bridge's side."""
    bridge: str
    variables: Mapping[str, str]

    @property
    def url(self) -> str:
        return f"http://{self.address}:{HTTP_PORT}"

    @property
    def env(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "HOME": str(self.home),  # where Ray looks for a token
            "TANDEM_HOME": str(self.home),
            "RAY_TMPDIR": str(self.home / "r"),
            "NO_COLOR": "1",
            "COLUMNS": "200",
            **self.variables,
        }

    def run(self, *command: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        """Run a command in the node's network namespace."""
        inside = ["ip", "netns", "exec", self.name, *command]
        return subprocess.run(
            inside,
            env=self.env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def tandem(self, *args: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        return self.run(str(TANDEM), *args, timeout_s=timeout_s)

    def check(self, *args: str, timeout_s: float = 240) -> str:
        """Run ``tandem`` and return its output; fail if it fails."""
        done = self.tandem(*args, timeout_s=timeout_s)
        assert done.returncode == 0, f"tandem {args}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def status(self) -> Any:
        return json.loads(self.check("status", "--json"))

    def pids(self, name: str) -> set[int]:
        """Return the ids of the node's processes with this name."""
        return {each.process.pid for each in processes.find(self.home) if each.name == name}

    def kill(self) -> None:
        """End all processes at once, as a power failure does; the network goes first."""
        self.disconnect()
        processes.end_all(self.home, grace_s=0)

    def disconnect(self) -> None:
        """Lose all packets from and to the node, as a broken switch does."""
        ip("link", "set", self.port, "nomaster")

    def connect(self) -> None:
        ip("link", "set", self.port, "master", self.bridge)


@dataclass
class Network:
    """Nodes on a bridge, which has an address in the test's own namespace."""

    nodes: list[Node]
    client: httpx.Client
    redis: str | None
    """URL of a Redis that has the state of the head; None if it is not installed."""

    @property
    def head(self) -> Node:
        return self.nodes[0]

    def up(self, config: Path, node: Node) -> None:
        """Start the head, and another node that joins while the head waits for its resources."""
        with ThreadPoolExecutor(1) as pool:
            head = pool.submit(self.start_head, config)
            wait_until(
                lambda: head.done() or can_connect(self.head.address, RAY_PORT), START_TIMEOUT_S
            )
            if not head.done():
                self.join(node)
            head.result()

    def start_head(self, config: Path) -> None:
        command = ["up", "-d", "--head", "--address", self.head.address, "--config", str(config)]
        if self.redis:
            command += ["--redis", self.redis]
        self.head.check(*command, timeout_s=START_TIMEOUT_S)

    def num_redis_keys(self) -> int:
        redis = parse_redis(str(self.redis))
        command = ["redis-cli", "-h", redis.host, "-p", str(redis.port), "dbsize"]
        env = {**os.environ, "REDISCLI_AUTH": redis.password}
        return int(subprocess.check_output(command, env=env, text=True).split()[-1])

    def join(self, node: Node) -> None:
        token = str(self.head.home / "ray-token")
        node.check("join", self.head.address, "-d", "--token-file", token, "--num-cpus", "1")

    def wait_for_status(self, node: Node, path: str, status: int) -> None:
        """Wait until the node's HTTP answers ``path`` with ``status``."""
        url = f"{node.url}{path}"
        wait_until(lambda: self.client.get(url).status_code == status, START_TIMEOUT_S)


@contextlib.contextmanager
def network(num: int, **variables: str) -> Iterator[Network]:
    """Create a network of ``num`` nodes; stop their processes and remove it at the end.

    Ray and links use TLS. ``variables`` are added to the environment of each node.
    """
    mark = f"{os.getpid() % 0xFFFFF:x}"
    third = os.getpid() % 200 + 20
    # Paths of sockets in Ray's directory have at most 107 characters.
    root = Path(f"/tmp/tn{mark}")
    bridge = f"tn{mark}b"
    addresses = [f"10.213.{third}.{i + 1}" for i in range(num)]
    root.mkdir()
    tls = certificates(root / "tls", *addresses)
    nodes = [
        Node(
            name=f"tn{mark}n{i}",
            address=address,
            home=root / str(i),
            port=f"tn{mark}v{i}",
            bridge=bridge,
            variables={**tls, **variables},
        )
        for i, address in enumerate(addresses)
    ]
    store.models_dir().mkdir(parents=True, exist_ok=True)
    client = httpx.Client(
        headers={"authorization": f"Bearer {OPERATOR_KEY}"},
        timeout=120,
        trust_env=False,
        limits=httpx.Limits(max_keepalive_connections=0),  # so that drained nodes may end
    )
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"10.213.{third}.254/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for node in nodes:
            _add(node)
        with client, _redis(root, f"10.213.{third}.254") as redis:
            yield Network(nodes, client, redis)
    finally:
        for home in filter(Path.is_dir, root.iterdir()):  # also of further nodes of a test
            processes.end_all(home, grace_s=0.5)
        for node in nodes:
            subprocess.run(["ip", "netns", "del", node.name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], check=False, capture_output=True)
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def _redis(directory: Path, address: str) -> Iterator[str | None]:
    """Run a Redis with a password on the test's side of the bridge; yield its URL."""
    if (executable := shutil.which("redis-server")) is None:
        yield None
        return
    options = {
        "--bind": address,
        "--port": str(RAY_PORT),
        "--requirepass": "pass word",
        "--save": "",
        "--dir": str(directory),
        "--logfile": str(directory / "redis.log"),
    }
    process = subprocess.Popen([executable, *itertools.chain(*options.items())])
    try:
        wait_until(lambda: can_connect(address, RAY_PORT))
        yield f"redis://:pass%20word@{address}:{RAY_PORT}/nodes"
    finally:
        process.terminate()
        process.wait()


def _add(node: Node) -> None:
    (node.home / "r").mkdir(parents=True)
    (node.home / "models").symlink_to(store.models_dir())
    ip("netns", "add", node.name)
    ip("link", "add", node.port, "type", "veth", "peer", "name", "eth0", "netns", node.name)
    ip("link", "set", node.port, "up")
    ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", "eth0")
    for interface in ("lo", "eth0"):
        ip("-n", node.name, "link", "set", interface, "up")
    node.connect()


def wait_until(condition: Callable[[], object], timeout_s: float = 120.0) -> None:
    """Wait until ``condition()`` is true; errors of a node that is not ready count as false."""
    running.wait_until(condition, timeout_s, "the change", ignored=(httpx.HTTPError,))


class Streams:
    """Streams to one node's HTTP, in threads; each must be complete.

    Args:
        url: HTTP address of the node.
        body: Request to ``/v1/chat/completions``.
        num: Concurrent streams.
    """

    def __init__(self, url: str, body: dict[str, Any], num: int) -> None:
        self._url = f"{url}/v1/chat/completions"
        self._body = {**body, "stream": True}
        self._num = num
        self._ending = threading.Event()
        self.complete = 0
        self.failures: list[str] = []

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._repeat) for _ in range(self._num)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, num: int, timeout_s: float = 180.0) -> None:
        """Wait until ``num`` more streams have completed."""
        wanted = self.complete + num
        wait_until(lambda: self.complete >= wanted or self.failures, timeout_s)

    def _repeat(self) -> None:
        headers = {"authorization": f"Bearer {OPERATOR_KEY}"}
        with httpx.Client(headers=headers, timeout=120, trust_env=False) as client:
            while not self._ending.is_set():
                try:
                    answer = client.post(self._url, json=self._body)
                    tokens = answer.text.count('"delta":{"content":')
                    whole = (
                        answer.text.endswith("data: [DONE]\n\n") and '"error":' not in answer.text
                    )
                    if answer.status_code != 200 or not whole:
                        raise AssertionError(f"{answer.status_code}: {answer.text[-300:]}")
                    if tokens != self._body["max_tokens"]:
                        raise AssertionError(f"{tokens} tokens")
                    self.complete += 1
                except (httpx.HTTPError, AssertionError) as error:
                    self.failures.append(repr(error))
                    time.sleep(0.2)
