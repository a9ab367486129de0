"""The link between this release and an earlier one, during an update of routers and replicas.

``tests/fixtures/link-session.json`` is a recording of the earlier release, made as described in
``tests/link_session.py``. Its frames are replayed to both ends of this release. If the repository
has its history, the earlier release itself runs, too.
"""

import asyncio
import hashlib
import hmac
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from struct import Struct
from typing import Any

import msgspec
import pytest

from cluster.gateway import ReplicaInfo
from cluster.link import frames as f
from tests import link_session

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "tests/fixtures/link-session.json").read_text("utf-8"))
HEADER = Struct("<IIBB")
OLD_JOURNAL = Struct("<II")
JOURNALS = 2
"""Requests with journals, the last ones of the session; the recording has format 1."""
HEADS = (f.REQUEST, f.RESPONSE, f.LOAD, f.USAGE)
"""Kinds whose payload is an array that newer releases may extend."""
NUM_COUNTS = 3
"""Fields of a USAGE that do not depend on time."""

Frame = tuple[int, int, int, bytes]


def recorded(end: str) -> list[Frame]:
    return [(stream, kind, flags, bytes.fromhex(p)) for stream, kind, flags, p in RECORDED[end]]


def of_stream(frames: list[Frame], stream: int) -> list[Frame]:
    return [frame for frame in frames if frame[0] == stream and frame[1] != f.WINDOW]


def known_part(kind: int, payload: bytes, like: bytes) -> Any:
    """Return what an end of the recorded release reads of a payload."""
    if kind not in HEADS:
        return payload
    fields = msgspec.msgpack.decode(payload)
    if kind == f.RESPONSE:
        fields[1] = [each for each in fields[1] if not each[0].startswith(b"x-tandem-")]
    known = NUM_COUNTS if kind == f.USAGE else len(msgspec.msgpack.decode(like))
    return fields[:known]


def meaning(frames: list[Frame]) -> list[Any]:
    """Return what an end of the recorded release reads of the frames of one stream.

    The pieces of a body count as one. The entries of journals are left out: a newer release may end
    them at once, because its own have another format.
    """
    found: list[Any] = []
    for _, kind, flags, payload in frames:
        if kind != f.DATA:
            found.append((kind, flags, payload))
            continue
        if flags & f.JOURNAL:
            size, _ = OLD_JOURNAL.unpack_from(payload)
            payload = payload[OLD_JOURNAL.size + (0 if size == f.NO_JOURNAL else size) :]
        if found and found[-1][0] == f.DATA:
            payload = found.pop()[2] + payload
        found.append((kind, flags & ~f.JOURNAL, payload))
    return found


def assert_understood(sent: list[Frame], like: list[Frame]) -> None:
    """Assert that frames mean the same to the recorded release as those that it sent itself."""
    for (kind, flags, payload), expected in zip(meaning(sent), meaning(like), strict=True):
        assert (kind, flags) == expected[:2]
        assert known_part(kind, payload, expected[2]) == known_part(kind, expected[2], expected[2])


class Peer:
    """An end of the recorded release: sends its frames, and collects those of the other end."""

    def __init__(
        self, end: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.frames = recorded(end)
        self.received: list[Frame] = []
        self._reader, self._writer = reader, writer
        self._hello = self.frames[0][3]

    def send(self, *frames: Frame) -> None:
        for stream, kind, flags, payload in frames:
            self._writer.write(HEADER.pack(len(payload), stream, kind, flags) + payload)

    async def read(self) -> Frame:
        """Return the next frame that is no heartbeat."""
        while True:
            length, *header = HEADER.unpack(await self._reader.readexactly(HEADER.size))
            frame = (*header, await self._reader.readexactly(length))
            if frame[1] == f.PING:
                self.send((0, f.PONG, 0, b""))
            elif frame[1] != f.PONG:
                self.received.append(frame)
                return frame

    async def shake_hands(self, *, is_router: bool) -> None:
        """Authenticate as the documentation of the handshake says."""
        self.send(self.frames[0])
        _, kind, _, other = await self.read()
        other_recorded = recorded("replica" if is_router else "router")[0][3]
        assert kind == f.HELLO
        assert (other[:6], len(other)) == (other_recorded[:6], len(other_recorded))
        router, replica = (self._hello, other) if is_router else (other, self._hello)

        def proof(role: bytes) -> bytes:
            signed = b"tandem link\0" + role + router + replica
            return hmac.digest(link_session.SECRET, signed, hashlib.sha256)

        if is_router:
            self.send((0, f.AUTH, 0, proof(b"client")))
        _, kind, _, auth = await self.read()
        assert (kind, auth) == (f.AUTH, proof(b"server" if is_router else b"client"))
        if not is_router:
            self.send((0, f.AUTH, 0, proof(b"server")))
        self.received.clear()

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


async def replay_replica(peer: Peer) -> None:
    """Answer each request with the recorded frames of its stream."""
    await peer.shake_hands(is_router=False)
    common = {kind: frame for frame in of_stream(peer.frames, 0) for kind in [frame[1]]}
    peer.send(common[f.LOAD])
    while True:
        stream, kind, flags, _ = await peer.read()
        answer = of_stream(peer.frames, stream)
        if kind == f.PREFIXES:
            peer.send(common[f.PREFIXES])
        elif kind == f.CANCEL:
            peer.send(*answer[2:])  # what follows the piece that it sent before
        elif flags & f.END:
            is_first_with_key = stream == 3
            peer.send(*([common[f.ANSWERS]] if is_first_with_key else []))
            is_cancelled = (stream, f.CANCEL) in {each[:2] for each in recorded("router")}
            peer.send(*(answer[:2] if is_cancelled else answer))


async def test_a_router_understands_a_replica_of_the_earlier_release() -> None:
    peers: list[Peer] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.append(Peer("replica", reader, writer))
        try:
            await replay_replica(peers[0])
        except asyncio.IncompleteReadError:
            await peers[0].close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        address = server.sockets[0].getsockname()[:2]
        session, reports = await link_session.run_router(*address, with_journals=False)
    assert session == RECORDED["session"][:-JOURNALS]
    assert reports == RECORDED["reports"]
    expected = recorded("router")[2:]  # without the handshake
    for stream in range(len(session) + 1):
        assert_understood(of_stream(peers[0].received, stream), of_stream(expected, stream))


async def test_a_replica_understands_a_router_of_the_earlier_release() -> None:
    server = link_session.start_server()
    peer = Peer("router", *await asyncio.open_connection(*(await server.start())))
    expected = recorded("replica")[2:]
    try:
        await peer.shake_hands(is_router=True)
        peer.send(*of_stream(peer.frames, 0)[2:])
        for stream in range(1, len(RECORDED["session"]) + 1):
            for frame in of_stream(peer.frames, stream):
                if frame[1] == f.CANCEL:
                    await peer.read(), await peer.read()
                peer.send(frame)
            while True:
                number, kind, flags, _ = await peer.read()
                if number == stream and (flags & f.END or kind == f.ERROR):
                    break
            sent = of_stream(peer.received, stream)
            assert_understood(sent, of_stream(expected, stream))
        first = {kind: payload for _, kind, _, payload in reversed(of_stream(peer.received, 0))}
        for _, kind, _, payload in of_stream(expected, 0):
            assert known_part(kind, first[kind], payload) == known_part(kind, payload, payload)
        assert first.keys() <= {frame[1] for frame in expected}
    finally:
        await peer.close()
        await server.stop()


def test_metadata_of_replicas_is_understood_in_both_directions() -> None:
    old: dict[str, Any] = RECORDED["metadata"]
    understood = ReplicaInfo.from_metadata("", old)
    assert understood == replace(link_session.REPLICA, journal_format=1)
    new = json.loads(json.dumps(link_session.REPLICA.to_metadata()))
    assert {name: new[name] for name in old} == old


# -- the earlier release itself --


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def earlier_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the code of the recorded commit."""
    if not (ROOT / ".git").exists() or _git("rev-parse", "--is-shallow-repository") == "true":
        pytest.skip("there is no history here; the recording stands for the earlier release")
    directory = tmp_path_factory.mktemp("earlier")
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", RECORDED["commit"], "cluster"],
        capture_output=True,
        check=True,
    )
    subprocess.run(["tar", "-x", "-C", str(directory)], input=archive.stdout, check=True)
    return directory


def start_session(code: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", str(ROOT / "tests/link_session.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(code)},
        cwd=code,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("router", "replica", "options"),
    [("earlier", "this", ["journals"]), ("this", "earlier", []), ("this", "this", ["journals"])],
)
def test_both_releases_have_the_same_session(
    router: str, replica: str, options: list[str], earlier_release: Path
) -> None:
    code = {"earlier": earlier_release, "this": ROOT}
    with start_session(code[replica], "replica") as serving:
        assert serving.stdout is not None
        port = serving.stdout.readline().strip()
        with start_session(code[router], "router", port, *options) as asking:
            output, _ = asking.communicate(timeout=60)
        serving.communicate(timeout=60)  # closes its stdin
    session, reports = json.loads(output)
    assert session == RECORDED["session"][: None if options else -JOURNALS]
    assert reports == RECORDED["reports"]
