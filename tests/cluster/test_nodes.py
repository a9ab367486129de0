"""Several nodes: a cluster of network namespaces, with simulated engines, a classifier and vLLM."""

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psycopg
import pytest
import yaml

from cluster.launch import processes
from cluster.launch.starter import HEAD_KEY
from cluster.link import tls_contexts
from cluster.models import store
from tests.cluster.batch_runs import submit
from tests.cluster.conftest import serve_config, sim_generator
from tests.cluster.nodes import (
    HTTP_PORT,
    OPERATOR_KEY,
    OPERATOR_SHA256,
    RAY_PORT,
    START_TIMEOUT_S,
    Network,
    Node,
    Streams,
    network,
    wait_until,
)
from tests.cluster.tiny_llama import make_tiny_llama

CHAT = {"model": "sim", "messages": [{"role": "user", "content": "Count."}], "max_tokens": 20}
LONG = {**CHAT, "max_tokens": 100}
"""Two seconds, so that a node that dies has answers in progress."""
LINE_MODELS = ["sim", "tiny"] * 4
"""Models of a batch's lines."""
LINE_TOKENS = 100
"""Two seconds of the simulated engine."""
PARTITION_S = 12.0
"""Longer than the 10 s of silence after which routers give a link up."""


def _problem() -> str | None:
    """Return why this machine cannot have network namespaces, or None."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and iproute2"
    name = f"tn{os.getpid():x}"
    done = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True, text=True)
    if done.returncode:
        return f"network namespaces are impossible here: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, postgres: str) -> Path:
    directory = tmp_path_factory.mktemp("config")
    make_tiny_llama(directory / "tiny", store.resolve("smollm2-135m-instruct"))
    return write_config(directory, postgres)


@pytest.fixture(scope="module")
def nodes(config: Path) -> Iterator[Network]:
    """Start a cluster of two nodes; a third one exists, but has not joined."""
    if problem := _problem():
        pytest.skip(problem)
    # By default, a drained node answers HTTP for at least 30 s.
    with network(3, RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S="10") as net:
        net.up(config, net.nodes[1])
        for node in net.nodes[:2]:
            net.wait_for_status(node, "/ready", 200)
        yield net


def write_config(directory: Path, database: str) -> Path:
    """Write a configuration whose router and simulated generator have a replica on each node.

    With one logical CPU per node, a node cannot hold two replicas of either. ``database`` keeps the
    batches; all nodes reach it by a socket in the file system.
    """
    replicas = {"min": 2, "max": 2}
    router = {"replicas": replicas, "resources": {"cpus": 0.55}}
    sim = sim_generator(
        replicas=replicas,
        resources={"cpus": 0.3},
        sim={"decode_s_per_token": 0.02},
    )
    tiny = {
        "name": "tiny",
        "model": str(directory / "tiny"),
        "max_model_len": 256,
        "kv_cache_memory_bytes": "64MiB",
        "dtype": "float32",
        "replicas": {"min": 1, "max": 1},
        "resources": {"cpus": 0.05},
    }
    classifier = {"name": "sentiment", "model": "sentiment-minilm", "resources": {"cpus": 0.05}}
    config = serve_config(
        generators=[sim, tiny],
        classifiers=[classifier],
        router={
            **router,
            "operator_keys_sha256": [OPERATOR_SHA256],
            "batches": {"database": database},
        },
        cluster={"num_cpus": 1},
    )
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def addresses(net: Network) -> dict[str, list[str]]:
    """Return the node of each running replica, by deployment."""
    return {
        each["name"]: sorted(r["node_ip"] for r in each["replicas"] if r["state"] == "RUNNING")
        for each in net.head.status()["application"]["deployments"]
    }


def wait_for_spread(net: Network, *expected: Node) -> None:
    """Wait until the router and the simulated generator have a replica on each of these nodes."""
    nodes = [node.address for node in expected]
    wanted = {"router": nodes, "generator-sim": nodes}
    wait_until(lambda: addresses(net).items() >= wanted.items(), START_TIMEOUT_S)


def test_http_of_each_node_streams_and_classifies(nodes: Network) -> None:
    wait_for_spread(nodes, *nodes.nodes[:2])
    for node in nodes.nodes[:2]:
        body = {**CHAT, "stream": True}
        for _ in range(4):  # by chance, at each replica
            answer = nodes.client.post(f"{node.url}/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.text.count("data: ") >= CHAT["max_tokens"]
            assert answer.text.endswith("data: [DONE]\n\n")
        texts = {"model": "sentiment", "input": ["I loved it.", "A boring mess."]}
        labels = nodes.client.post(f"{node.url}/classify", json=texts).json()["data"]
        assert [label["label"] for label in labels] == ["POSITIVE", "NEGATIVE"]
        without_key = nodes.client.get(f"{node.url}/v1/models", headers={"authorization": ""})
        assert without_key.status_code == 401


def test_a_stream_of_vllm_crosses_nodes(nodes: Network) -> None:
    """Each node prefers its own router, and there is one replica, so one stream crosses."""
    texts = set()
    for node in nodes.nodes[:2]:
        with openai.OpenAI(
            base_url=f"{node.url}/v1", api_key=OPERATOR_KEY, max_retries=0
        ) as client:
            stream = client.completions.create(
                model="tiny",
                prompt="Hello there",
                max_tokens=48,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            chunks = list(stream)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 48
        texts.add("".join(choice.text for chunk in chunks for choice in chunk.choices))
    assert len(texts) == 1


def test_statistics_of_haproxy_are_on_loopback(nodes: Network) -> None:
    for node in nodes.nodes[:2]:
        lines = node.run("ss", "-Hltnp").stdout.splitlines()
        listening = {line.split()[3] for line in lines if '("haproxy"' in line}
        assert f"0.0.0.0:{HTTP_PORT}" in listening
        hosts = {address.rsplit(":", 1)[0] for address in listening - {f"0.0.0.0:{HTTP_PORT}"}}
        assert hosts == {"127.0.0.1"}, listening


def test_ray_requires_the_token(nodes: Network) -> None:
    (dashboard,) = {node.status()["state"]["dashboard_url"] for node in nodes.nodes[:2]}
    answer = nodes.client.get(f"{dashboard}/api/serve/applications/")
    assert answer.status_code in (401, 403)
    assert (nodes.head.home / "ray-token").stat().st_mode & 0o077 == 0
    code = "import sys; from cluster.ray_internals import read_remote_kv as read\n"
    code += f"read(sys.argv[1], {HEAD_KEY!r}, 60)"
    done = nodes.head.run(sys.executable, "-c", code, f"{nodes.head.address}:{RAY_PORT}")
    assert done.returncode == 1
    assert re.search("(?i)token|authenticat", done.stderr), done.stderr


def test_ray_requires_a_certificate(nodes: Network) -> None:
    member = tls_contexts(nodes.head.env)
    assert member is not None
    stranger = ssl.create_default_context(cafile=nodes.head.variables["RAY_TLS_CA_CERT"])
    stranger.check_hostname = False
    assert grpc_settings(nodes.head, member.client)
    assert not grpc_settings(nodes.head, stranger)


def grpc_settings(node: Node, context: ssl.SSLContext) -> bytes:
    """Return what the GCS sends at the start of a connection; empty if it refuses it."""
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((node.address, RAY_PORT), 60) as connection,
            context.wrap_socket(connection) as encrypted,
        ):
            encrypted.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            return encrypted.recv(9)
    except (ssl.SSLError, ConnectionError):
        return b""


def test_a_wrong_token_and_an_unreachable_head_are_named(nodes: Network) -> None:
    spare = nodes.nodes[2]
    wrong = spare.home / "wrong"
    wrong.write_text("wrong" * 8)
    closed = f"{nodes.head.address}:1"
    done = spare.tandem("join", closed, "-d")
    assert done.returncode == 1
    assert f"no head responds at {closed}" in done.stderr
    done = spare.tandem("join", nodes.head.address, "-d")
    assert "no token for the cluster" in done.stderr
    done = spare.tandem("join", nodes.head.address, "-d", "--token-file", str(wrong))
    assert done.returncode == 1
    assert done.stderr.startswith("error: Ray failed to start: ")
    assert processes.find(spare.home) == []


def test_keys_apply_on_all_nodes(nodes: Network) -> None:
    head, node, _ = nodes.nodes
    remote = ("--address", node.url, "keys")
    operator = ("--api-key", OPERATOR_KEY)
    keys = [
        head.check("keys", "add", "acme").strip(),
        node.check(*remote, "add", "acme", *operator).strip(),  # by a task on the head
    ]

    def statuses() -> set[int]:
        headers = [{"authorization": f"Bearer {key}"} for key in keys]
        get = nodes.client.get
        urls = [f"{n.url}/v1/models" for n in (head, node)]
        return {get(url, headers=each).status_code for url in urls for each in headers}

    wait_until(lambda: statuses() == {200})
    assert "acme" in node.check(*remote, "list", *operator)
    done = node.tandem("keys", "add", "acme")
    assert done.returncode == 1
    assert f"run `tandem keys` on {head.address}" in done.stderr
    head.check("keys", "revoke", keys[1])
    node.check(*remote, "revoke", keys[0], *operator)
    wait_until(lambda: statuses() == {401})


def router_of_batches(net: Network, database: str) -> tuple[Node, int]:
    """Return the router that runs the batches: its node and process."""
    with psycopg.connect(database) as connection:
        ((owner,),) = connection.execute("SELECT owner FROM tandem_tandem.lease").fetchall()
    deployments = net.head.status()["application"]["deployments"]
    (router,) = [each for each in deployments if each["name"] == "router"]
    (replica,) = [each for each in router["replicas"] if each["id"] == owner]
    (node,) = [each for each in net.nodes if each.address == replica["node_ip"]]
    return node, replica["pid"]


def test_a_batch_survives_its_router_and_is_seen_on_each_node(
    nodes: Network, postgres: str
) -> None:
    """Half of the lines are for vLLM, the others for a simulated engine on each node."""
    head, node, _ = nodes.nodes
    batch = submit(nodes.client, head.url, [*LINE_MODELS, *LINE_MODELS], LINE_TOKENS)
    batch.wait_for_lines(node.url)
    _, pid = router_of_batches(nodes, postgres)
    os.kill(pid, signal.SIGKILL)
    for each in (node, head):
        batch.check_results(each.url, LINE_TOKENS)
    wait_for_spread(nodes, head, node)
    for each in (head, node):
        nodes.wait_for_status(each, "/ready", 200)


def test_each_node_shows_status_usage_and_health_of_the_cluster(nodes: Network) -> None:
    both = nodes.nodes[:2]
    for node in both:
        found = node.status()
        assert found["state"]["http_url"] == node.url
        replicas = [r for d in found["application"]["deployments"] for r in d["replicas"]]
        assert {r["node_ip"] for r in replicas} == {each.address for each in both}
        remote = ("--address", node.url, "logs", "--api-key", OPERATOR_KEY)
        for command in (("logs",), remote):
            logs = node.check(*command)
            assert all(f"{each.address}/serve/tandem_requests" in logs for each in both), logs
    wait_until(lambda: usage(nodes, both[0]) == usage(nodes, both[1]) > 0)
    doctor = both[1].tandem("doctor", "--json").stdout
    checks = ("processes", "ports", "authentication", "router")
    findings = [f for f in yaml.safe_load(doctor) if f["check"] in checks]
    assert {f["check"] for f in findings} == set(checks)
    # Leftovers of other clusters of this machine are a warning.
    assert "fail" not in {f["level"] for f in findings}, findings


def usage(net: Network, node: Node) -> int:
    """Return the completion tokens of all models, as the node's HTTP reports them."""
    answer = net.client.get(f"{node.url}/v1/usage").json()
    return sum(row["completion_tokens"] for row in answer["data"])


def test_a_partition_breaks_no_answer_of_the_other_node(nodes: Network) -> None:
    head, node, _ = nodes.nodes
    raylet = node.pids("raylet")
    with Streams(head.url, LONG, 6) as streams:
        streams.wait_for(6)
        complete = streams.complete
        node.disconnect()
        time.sleep(PARTITION_S)
        node.connect()
        assert streams.complete > complete
        streams.wait_for(12)
    assert streams.failures == []
    nodes.wait_for_status(node, "/ready", 200)
    assert node.pids("raylet") == raylet
    with Streams(node.url, CHAT, 2) as streams:
        streams.wait_for(8)
    assert streams.failures == []


def test_a_killed_node_breaks_no_answer_of_others_and_is_replaced_under_load(
    nodes: Network,
) -> None:
    head, killed, added = nodes.nodes
    batch = submit(nodes.client, killed.url, LINE_MODELS, LINE_TOKENS)
    batch.wait_for_lines(killed.url)
    with Streams(head.url, LONG, 6) as streams:
        streams.wait_for(6)
        killed.kill()
        streams.wait_for(12)
        killed.connect()  # the machine is back, without the node
        nodes.join(added)
        wait_for_spread(nodes, head, added)
        nodes.wait_for_status(added, "/ready", 200)
        with Streams(added.url, LONG, 2) as arriving:
            arriving.wait_for(4)
    assert streams.failures == arriving.failures == []
    batch.check_results(head.url, LINE_TOKENS)


def test_a_node_is_drained_under_load(nodes: Network) -> None:
    head, added, drained = nodes.nodes
    nodes.join(added)  # after its crash
    with Streams(head.url, LONG, 4) as streams:
        with Streams(drained.url, LONG, 2) as leaving:
            leaving.wait_for(2)
            said = head.check("drain", drained.address, "--api-key", OPERATOR_KEY)
            assert f"Node {drained.address}" in said
            # Load balancers send nothing more then.
            nodes.wait_for_status(drained, "/-/healthz", 503)
        wait_for_spread(nodes, head, added)
        nodes.wait_for_status(added, "/ready", 200)
        with Streams(added.url, LONG, 2) as arriving:
            arriving.wait_for(4)
    assert streams.failures == leaving.failures == arriving.failures == []
    wait_until(lambda: not drained.pids("raylet"), START_TIMEOUT_S)


def test_a_node_serves_until_the_head_is_back(nodes: Network, config: Path) -> None:
    if nodes.redis is None:
        pytest.skip("redis-server is not installed")
    head, node, _ = nodes.nodes
    raylet = node.pids("raylet")
    batch = submit(nodes.client, head.url, LINE_MODELS, LINE_TOKENS)
    batch.wait_for_lines(head.url)
    with Streams(node.url, LONG, 4) as streams:
        streams.wait_for(4)
        head.kill()
        streams.wait_for(12)
        head.connect()
        nodes.start_head(config)
        wait_for_spread(nodes, head, node)
        streams.wait_for(8)
    assert streams.failures == []
    assert node.pids("raylet") == raylet
    batch.check_results(node.url, LINE_TOKENS)
    with Streams(head.url, CHAT, 2) as streams:
        streams.wait_for(4)
    assert streams.failures == []


def test_a_node_leaves(nodes: Network) -> None:
    head, node, _ = nodes.nodes
    with Streams(head.url, LONG, 4) as streams:
        streams.wait_for(4)
        assert "Stopped" in node.check("down")
        streams.wait_for(8)
    assert streams.failures == []
    assert node.status() == {"running": False}
    assert head.status()["running"]


def test_down_on_the_head_deletes_its_state(nodes: Network) -> None:
    assert nodes.redis is None or nodes.num_redis_keys() > 0
    assert "Stopped" in nodes.head.check("down", "--drain-s", "0")
    assert nodes.redis is None or nodes.num_redis_keys() == 0
