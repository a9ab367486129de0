"""``POST /drain``, which ``tandem drain`` calls: replicas and nodes by id, prefix and address."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import router_client
from cluster.cli.app import app
from cluster.errors import NotFoundError, UnavailableError
from cluster.gateway.builtin.drain import DRAIN_PATH, REPLICA_DRAIN_PATH, NodeDrains, NodeInfo
from cluster.gateway.reporting.dashboard import DATA_PATH
from cluster.link import LinkServer
from tests import asgi
from tests.serve.gateway_kit import CHAT, Replica, World, gateway_world
from tests.serve.test_cli_http import FakeRouter, router  # noqa: F401, a fixture

ID = "abcdef12"
NODES = [
    NodeInfo("aa11" + 52 * "0", "10.0.0.1", is_head=True),
    NodeInfo("bb22" + 52 * "0", "10.0.0.2", is_head=False),
    NodeInfo("abcd" + 52 * "0", "10.0.0.3", is_head=False),
    NodeInfo("ee55" + 52 * "0", "10.0.0.3", is_head=False),
]


class Drainable(Replica):
    """Replica that refuses new requests once it was told to drain."""

    server: LinkServer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != REPLICA_DRAIN_PATH:
            await super().__call__(scope, receive, send)
            return
        self.server.retire()
        await send({"type": "http.response.start", "status": 202, "headers": []})
        await send({"type": "http.response.body", "body": b""})


class Nodes(NodeDrains):
    """Nodes of a cluster; a node drains unless Ray refuses."""

    def __init__(self) -> None:
        self.drained: list[str] = []
        self.refusal = ""

    async def list_nodes(self) -> list[NodeInfo]:
        return NODES

    async def drain(self, node: NodeInfo) -> None:
        if self.refusal:
            raise UnavailableError(self.refusal)
        self.drained.append(node.ip)


@asynccontextmanager
async def a_world(
    nodes: Nodes, **router_config: Any
) -> AsyncIterator[tuple[World, Drainable, Replica]]:
    async with gateway_world(nodes=nodes, **router_config) as world:
        replica = Drainable(ID)
        replica.server = await world.serve(replica, "gen", ID, node_id=NODES[1].id)
        other = await world.add("gen", "xyz12345")
        yield world, replica, other


async def drain(world: World, target: str, **headers: str) -> asgi.Answer:
    return await asgi.post(world.app, f"{DRAIN_PATH}?target={target}", {}, headers=headers)


async def test_a_replica_is_drained_while_ray_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail(nodes: Nodes) -> list[NodeInfo]:
        raise UnavailableError("Ray does not answer.")

    monkeypatch.setattr(Nodes, "list_nodes", fail)
    async with a_world(Nodes()) as (world, *_):
        assert (await drain(world, ID)).status == 200
        assert (await drain(world, "nothing")).status == 503


@pytest.mark.parametrize("target", [ID, "abcde"])
async def test_a_replica_is_drained_and_answers_what_it_has(target: str) -> None:
    async with a_world(Nodes()) as (world, replica, other):
        request = {"model": "gen", "wait_after": True, "messages": []}
        calls = [asgi.start(world.app, "POST", CHAT, request) for _ in range(2)]
        await world.until(lambda: len(replica.seen) == 1)
        answer = await drain(world, target)
        expected = {"kind": "replica", "id": ID, "model": "gen", "in_flight": 1}
        assert (answer.status, answer.json()) == (200, expected)
        pool = world.gateway.pools["gen"]
        await world.until(lambda: pool.replicas.num_ready == 1)
        (shown,) = (
            each
            for each in (await asgi.get(world.app, DATA_PATH)).json()["pools"]["gen"]["replicas"]
            if each["id"] == ID
        )
        assert shown["is_draining"]
        assert (await asgi.post(world.app, CHAT, {"model": "gen", "messages": []})).status == 200
        assert len(replica.seen) == 1
        assert (await drain(world, target)).status == 200  # again, without any effect
        replica.gate.set()
        other.gate.set()
        assert [(await call.done()).status for call in calls] == [200, 200]


@pytest.mark.parametrize("target", ["10.0.0.2", NODES[1].id, "bb2"])
async def test_a_node_is_drained_by_ray(target: str) -> None:
    nodes = Nodes()
    async with a_world(nodes) as (world, *_):
        answer = (await drain(world, target)).json()
        assert answer["replicas"] == [{"id": ID, "model": "gen"}]
        assert nodes.drained == ["10.0.0.2"]
        nodes.refusal = "Ray does not drain it."
        assert (await drain(world, target)).status == 503


@pytest.mark.parametrize(
    ("target", "status", "message"),
    [
        ("", 400, "target is missing"),
        ("nothing", 404, "There is no replica or node 'nothing'"),
        ("ab", 404, "a prefix needs 3 characters"),
        ("10.0.0", 404, "There is no replica or node"),
        ("abc", 400, f"'abc' is ambiguous: replica {ID}, node {NODES[2].id}."),
        ("10.0.0.3", 400, f"ambiguous: node {NODES[2].id}, node {NODES[3].id}."),
        ("10.0.0.1", 400, "10.0.0.1 is the head node"),
        ("xyz", 503, "has another version"),
    ],
)
async def test_what_cannot_be_drained_gets_a_typed_error(
    target: str, status: int, message: str
) -> None:
    nodes = Nodes()
    async with a_world(nodes) as (world, *_):
        answer = await drain(world, target)
        assert answer.status == status
        assert message in answer.json()["error"]["message"]
        assert not nodes.drained


async def test_only_operators_and_only_json_drain() -> None:
    keys = {
        "api_keys_sha256": [sha256(b"tenant").hexdigest()],
        "operator_keys_sha256": [sha256(b"operator").hexdigest()],
    }
    async with a_world(Nodes(), **keys) as (world, *_):
        assert (await drain(world, ID)).status == 401
        assert (await drain(world, ID, authorization="Bearer tenant")).status == 403
        operator = {"authorization": "Bearer operator"}
        # A form of another site's page could send this.
        plain = {**operator, "content-type": "text/plain"}
        assert (await drain(world, ID, **plain)).status == 400
        assert (await asgi.get(world.app, DRAIN_PATH, headers=operator)).status == 405
        assert (await drain(world, ID, **operator)).status == 200


def test_the_command_prints_what_happens(router: FakeRouter) -> None:  # noqa: F811
    def run(answer: Any, status: int = 200) -> str:
        router.answer = lambda path, body: (status, answer)
        done = CliRunner().invoke(app, ["drain", "a b", "--url", router.url])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.output

    replica = {"kind": "replica", "id": ID, "model": "gen", "in_flight": 3}
    assert f"Replica {ID} of gen drains" in run(replica)
    assert router.requests[-1] == (f"{router_client.DRAIN_PATH}?target=a%20b", {})
    node = {"kind": "node", "id": "n", "ip": "10.0.0.2", "replicas": [{"id": ID, "model": "gen"}]}
    assert f"Serve moves its 1 replica(s) to other nodes: {ID} (gen)." in run(node)
    with pytest.raises(NotFoundError, match="no replica"):
        run({"error": {"message": "There is no replica or node."}}, 404)
