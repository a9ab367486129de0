"""Several nodes: a cluster of network namespaces, with the simulated engine and the classifier."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from cluster import ray_internals
from cluster.launch import processes
from cluster.launch.starter import HEAD_KEY
from tests.cluster.conftest import serve_config, sim_generator
from tests.cluster.nodes import (
    HTTP_PORT,
    OPERATOR_SHA256,
    Network,
    Node,
    Streams,
    network,
    wait_until,
)

CHAT = {"model": "sim", "messages": [{"role": "user", "content": "Count."}], "max_tokens": 20}


pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"
)


def write_config(path: Path) -> Path:
    """Write a configuration whose router and generator have a replica on each of two nodes.

    With one logical CPU per node, a node cannot hold two replicas of either.
    """
    router = {"replicas": {"min": 2, "max": 2}, "resources": {"cpus": 0.6}}
    classifier = {"name": "sentiment", "model": "sentiment-minilm", "resources": {"cpus": 0.05}}
    config = serve_config(
        generators=[sim_generator(replicas={"min": 2, "max": 2}, resources={"cpus": 0.3})],
        classifiers=[classifier],
        router={**router, "operator_keys_sha256": [OPERATOR_SHA256]},
        cluster={"num_cpus": 1},
    )
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    config = write_config(tmp_path_factory.mktemp("config") / "config.yaml")
    with network(2) as net:
        net.up(config)
        yield net


def addresses(net: Network, deployment: str) -> list[str]:
    """Return the node of each running replica of a deployment."""
    (found,) = [d for d in net.head.status()["application"]["deployments"]
                if d["name"] == deployment]  # fmt: skip
    return sorted(r["node_ip"] for r in found["replicas"] if r["state"] == "RUNNING")


def test_http_of_each_node_streams_and_classifies(two_nodes: Network) -> None:
    everywhere = [node.address for node in two_nodes.nodes]
    for node in two_nodes.nodes:
        body = {**CHAT, "stream": True}
        for _ in range(4):  # by chance, at each router and replica
            answer = two_nodes.client.post(f"{node.url}/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.text.count("data: ") >= CHAT["max_tokens"]
            assert answer.text.endswith("data: [DONE]\n\n")
        texts = {"model": "sentiment", "input": ["I loved it.", "A boring mess."]}
        labels = two_nodes.client.post(f"{node.url}/classify", json=texts).json()["data"]
        assert [label["label"] for label in labels] == ["POSITIVE", "NEGATIVE"]
        without_key = two_nodes.client.get(f"{node.url}/v1/models", headers={"authorization": ""})
        assert without_key.status_code == 401
    wait_until(lambda: addresses(two_nodes, "router") == everywhere)
    assert addresses(two_nodes, "generator-sim") == everywhere


def test_statistics_and_serves_admin_socket_are_on_loopback(two_nodes: Network) -> None:
    for node in two_nodes.nodes:
        for owned in processes.find(node.home):
            ips = {
                connection.laddr.port: connection.laddr.ip
                for connection in owned.process.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            }
            if owned.name == "haproxy":
                # A replaced process, which finishes its requests, no longer has it.
                assert ips.pop(HTTP_PORT, "0.0.0.0") == "0.0.0.0"
                assert set(ips.values()) == {"127.0.0.1"}, ips


def test_ray_requires_the_token(two_nodes: Network) -> None:
    (head,) = {node.status()["state"]["dashboard_url"] for node in two_nodes.nodes}
    assert two_nodes.client.get(f"{head}/api/serve/applications/").status_code in (401, 403)
    with pytest.raises(Exception, match=r"(?i)token|auth"):
        ray_internals.read_remote_kv(f"{two_nodes.head.address}:6379", HEAD_KEY, 10)
    assert (two_nodes.head.home / "ray-token").stat().st_mode & 0o077 == 0


def test_a_wrong_token_and_an_unreachable_head_are_named(two_nodes: Network) -> None:
    node = two_nodes.nodes[1]
    ports = {"RAY_SERVE_HAPROXY_STATS_PORT": "8405", "RAY_SERVE_HAPROXY_METRICS_PORT": "9102"}
    spare = Node(node.name, node.address, node.home.parent / "spare", ports)
    spare.home.mkdir()
    (spare.home / "wrong").write_text("wrong" * 8)
    done = spare.tandem("join", "10.255.255.1:1", "-d")
    assert done.returncode == 1
    assert "no head responds at 10.255.255.1:1" in done.stderr
    head = two_nodes.head.address
    done = spare.tandem("join", head, "-d")
    assert "no token for the cluster" in done.stderr
    done = spare.tandem("join", head, "-d", "--token-file", str(spare.home / "wrong"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: Ray failed to start: ")
    assert processes.find(spare.home) == []


def test_keys_apply_on_all_nodes(two_nodes: Network) -> None:
    head, node = two_nodes.nodes
    key = head.check("keys", "add", "acme").strip()
    headers = {"authorization": f"Bearer {key}"}

    def statuses() -> set[int]:
        get = two_nodes.client.get
        return {get(f"{n.url}/v1/models", headers=headers).status_code for n in (head, node)}

    wait_until(lambda: statuses() == {200})
    done = node.tandem("keys", "add", "acme")
    assert done.returncode == 1
    assert f"run `tandem keys` on {head.address}" in done.stderr
    head.check("keys", "revoke", key)
    wait_until(lambda: statuses() == {401})


def test_each_node_shows_the_status_of_all(two_nodes: Network) -> None:
    for node in two_nodes.nodes:
        found = node.status()
        assert found["state"]["http_url"] == node.url
        replicas = [r for d in found["application"]["deployments"] for r in d["replicas"]]
        assert {r["node_ip"] for r in replicas} == {node.address for node in two_nodes.nodes}


def test_a_partition_breaks_no_answer_of_the_other_node(two_nodes: Network) -> None:
    head, node = two_nodes.nodes
    with Streams(head.url, CHAT, 6) as streams:
        streams.wait_for(12)
        node.disconnect()
        streams.wait_for(24)
        node.connect()
        streams.wait_for(24)
    assert streams.failures == []
    two_nodes.wait_for_http(node)


def test_a_killed_node_breaks_no_answer_of_the_other_and_can_be_replaced_under_load(
    two_nodes: Network,
) -> None:
    head, node = two_nodes.nodes
    wait_until(lambda: addresses(two_nodes, "generator-sim") == [head.address, node.address])
    with Streams(head.url, CHAT, 6) as streams:
        streams.wait_for(12)
        node.kill()
        streams.wait_for(24)
        node.connect()
        assert two_nodes.join(node)
        two_nodes.wait_for_http(node)
        with Streams(node.url, CHAT, 2) as added:
            added.wait_for(8)
    assert streams.failures == []
    assert added.failures == []


def test_a_node_leaves(two_nodes: Network) -> None:
    head, node = two_nodes.nodes
    with Streams(head.url, CHAT, 4) as streams:
        streams.wait_for(4)
        assert "Stopped" in node.check("down")
        streams.wait_for(8)
    assert streams.failures == []
    assert node.status() == {"running": False}
    assert head.status()["running"]
