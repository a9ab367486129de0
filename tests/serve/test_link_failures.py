"""The link over loopback with dead, hostile, silent and restarted peers."""

import asyncio
import logging
import time
from pathlib import Path

import pytest

from cluster.errors import LinkAuthError, LinkClosedError, LinkProtocolError
from cluster.link import (
    LinkClient,
    LinkOptions,
    LinkServer,
    LinkState,
    RequestHead,
    TlsContexts,
    certificate_expiry,
    tls_contexts,
)
from cluster.link import frames as f
from cluster.link import handshake as handshakes
from cluster.link.client import ClientConnection
from cluster.load import Load
from tests.certificates import certificates
from tests.serve.link_kit import (
    SECRET,
    RawPeer,
    ask,
    echo,
    hang,
    linked,
    on_both_loops,
    raw_server,
    read_all,
    until,
)


class Quarters:
    """Count of the quarters of a second that this event loop noticed; a stalled loop skips some."""

    def __init__(self) -> None:
        self._count = -1
        self._tick()

    def _tick(self) -> None:
        self._count += 1
        self._timer = asyncio.get_running_loop().call_later(0.25, self._tick)

    def stop(self) -> int:
        self._timer.cancel()
        return self._count


@on_both_loops
async def test_a_silent_peer_is_detected_within_two_seconds() -> None:
    async def mute(peer: RawPeer) -> None:
        await peer.shake("server")
        await peer.wait_closed_by_peer()

    async with raw_server(mute) as (host, port):
        client = LinkClient(host, port, SECRET)
        await client.connect()
        quarters = Quarters()
        await until(lambda: not client.connected)
        assert 6 <= quarters.stop() <= 8
        assert client.state is LinkState.SILENT
        with pytest.raises(LinkClosedError, match="silent"):
            client.open(RequestHead())
        await client.close()


async def test_a_peer_that_sends_but_hears_nothing_counts_as_silent() -> None:
    """A network that is cut in one direction: its pings arrive, and no answer to ours."""

    async def deaf(peer: RawPeer) -> None:
        await peer.shake("server")
        while True:
            peer.writer.write(f.encode_frame(0, f.PING))
            await asyncio.sleep(0.02)

    options = LinkOptions(silent_after_s=0.2, dead_after_s=30)
    async with raw_server(deaf) as (host, port):
        client = LinkClient(host, port, SECRET, options=options)
        await client.connect()
        await until(lambda: client.state is LinkState.SILENT)
        await client.close()


@on_both_loops
async def test_a_link_is_used_again_after_silence() -> None:
    speak = asyncio.Event()

    async def pausing(peer: RawPeer) -> None:
        await peer.shake("server")
        await speak.wait()
        while True:
            peer.writer.write(f.encode_frame(0, f.PONG))
            await asyncio.sleep(0.02)

    options = LinkOptions(silent_after_s=0.2, dead_after_s=30)
    async with raw_server(pausing) as (host, port):
        client = LinkClient(host, port, SECRET, options=options)
        await client.connect()
        stream = client.open(RequestHead())
        await until(lambda: client.state is LinkState.SILENT)
        assert not stream.ended
        speak.set()
        await until(lambda: client.connected)
        await client.close()


@on_both_loops
async def test_streams_fail_if_the_peer_stays_silent() -> None:
    async def mute(peer: RawPeer) -> None:
        await peer.shake("server")
        await peer.wait_closed_by_peer()

    async with raw_server(mute) as (host, port):
        options = LinkOptions(silent_after_s=0.1, dead_after_s=0.3)
        client = LinkClient(host, port, SECRET, options=options)
        await client.connect()
        streams = [client.open(RequestHead()) for _ in range(3)]
        errors = await asyncio.gather(*(s.head() for s in streams), return_exceptions=True)
        assert {type(error) for error in errors} == {LinkClosedError}
        assert len({id(error) for error in errors}) == 3
        assert client.counts.connects == 1
        await client.close()


@on_both_loops
async def test_the_work_of_a_silent_router_is_cancelled() -> None:
    options = LinkOptions(dead_after_s=0.4)
    async with linked(hang, options=options) as (server, _):
        peer = await RawPeer.dial(server.address)
        await peer.shake("client", window_bytes=100_000)
        peer.writer.write(f.encode_frame(1, f.REQUEST, f.END, f.encode_head(RequestHead())))
        await until(lambda: server.num_streams == 1)
        await until(lambda: server.num_streams == 0)
        await peer.close()


@on_both_loops
async def test_a_peer_that_sends_anything_is_alive() -> None:
    async def chatty(peer: RawPeer) -> None:
        await peer.shake("server")
        while True:  # never answers a ping
            await asyncio.sleep(0.05)
            peer.writer.write(f.encode_frame(0, f.LOAD, 0, f.encode_head(Load())))

    options = LinkOptions(dead_after_s=0.3)
    async with raw_server(chatty) as (host, port), linked(hang, options=options) as (_, quiet):
        client = LinkClient(host, port, SECRET, options=options)
        await client.connect()
        stream = quiet.open(RequestHead())
        assert await stream.read() == b"!"
        await asyncio.sleep(0.9)  # three times dead_after_s
        assert client.connected
        assert quiet.connected
        assert not stream.ended
        await client.close()


@on_both_loops
async def test_a_stalled_event_loop_does_not_end_its_links() -> None:
    async with linked(echo, options=LinkOptions(dead_after_s=0.2)) as (_, client):
        stream = client.open(RequestHead(), b"x")
        for _ in range(3):
            time.sleep(0.5)  # noqa: ASYNC251, the stall is the point
            await asyncio.sleep(0)
        assert await read_all(stream) == b"x"
        assert client.connected


@on_both_loops
async def test_a_lost_connection_fails_every_open_stream_at_once() -> None:
    async with linked(hang) as (server, client):
        streams = [client.open(RequestHead()) for _ in range(20)]
        for stream in streams:
            await stream.head()
        reads = [asyncio.create_task(read_all(stream)) for stream in streams]
        (connection,) = server.connections
        connection.fail(LinkClosedError("lost"))
        done, _ = await asyncio.wait(reads)
        assert {type(task.exception()) for task in done} == {LinkClosedError}
        await until(lambda: server.num_streams == 0)


@on_both_loops
async def test_the_client_reconnects_after_the_replica_restarts() -> None:
    first = LinkServer(echo, SECRET)
    host, port = await first.start()
    client = LinkClient(host, port, SECRET)
    states: list[LinkState] = []
    client.on_state = states.append
    await client.connect()
    await first.stop()
    await until(lambda: not client.connected)
    with pytest.raises(LinkClosedError):
        client.open(RequestHead())
    second = LinkServer(echo, SECRET, host=host, port=port)
    await second.start()
    await client.connect()
    assert await ask(client, "/", b"again") == (200, b"again")
    await client.close()
    await second.stop()
    assert [state.value for state in states] == [
        "connected",
        "draining",
        "connecting",
        "connected",
        "closed",
    ]


@on_both_loops
async def test_a_router_that_connects_during_a_drain_gets_a_goaway() -> None:
    async with linked(hang) as (server, client):
        await client.open(RequestHead()).head()
        late = await RawPeer.dial(server.address)
        await until(lambda: len(server.connections) == 2)
        drain = asyncio.create_task(server.drain(0.2))
        await late.shake("client")
        assert f.GOAWAY in [(await late.next_frame())[1] for _ in range(2)]
        await late.wait_closed_by_peer()
        await late.close()
        assert await drain == (0, 1)


@on_both_loops
async def test_a_replica_that_drains_at_once_gets_no_streams() -> None:
    async def leaving(peer: RawPeer) -> None:
        handshake = handshakes.Handshake("server", SECRET, 1000)
        peer.writer.write(handshake.hello())
        for _ in range(2):
            _, kind, _, payload = await peer.next_frame()
            answer = handshake.receive(kind, payload)
        peer.writer.write(answer + f.encode_frame(0, f.GOAWAY))
        await peer.wait_closed_by_peer()

    async with raw_server(leaving) as (host, port):
        client = LinkClient(host, port, SECRET)
        client.start()
        await until(lambda: client.state is LinkState.DRAINING)
        with pytest.raises(LinkClosedError, match="draining"):
            client.open(RequestHead())
        await client.close()


@on_both_loops
async def test_a_callback_that_raises_does_not_end_the_link(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def defect(state: LinkState) -> None:
        client.on_state = None
        raise ZeroDivisionError

    server = LinkServer(echo, SECRET)
    host, port = await server.start()
    client = LinkClient(host, port, SECRET)
    client.on_state = defect
    await client.connect()
    assert "ZeroDivisionError" in caplog.text
    assert await ask(client, "/", b"x") == (200, b"x")
    await client.close()
    await server.stop()


@on_both_loops
async def test_connect_waits_for_a_late_replica_and_times_out() -> None:
    server = LinkServer(echo, SECRET)
    host, port = await server.start()
    await server.stop()
    client = LinkClient(host, port, SECRET)
    with pytest.raises(LinkClosedError, match="cannot reach"):
        await client.connect(timeout_s=0.1)
    waiting = asyncio.create_task(client.connect())
    late = LinkServer(echo, SECRET, host=host, port=port)
    await late.start()
    await waiting
    assert client.connected
    await client.close()
    await client.close()
    await late.stop()


@on_both_loops
async def test_closing_the_client_fails_its_streams_and_cancels_their_work() -> None:
    server = LinkServer(hang, SECRET)
    host, port = await server.start()
    client = LinkClient(host, port, SECRET)
    await client.connect()
    streams = [client.open(RequestHead(), body) for body in (b"", b"x" * 5_000_000)]
    for stream in streams:
        await stream.head()
        assert await stream.read() == b"!"
    await client.close()
    for stream in streams:
        with pytest.raises(LinkClosedError):
            await stream.read()
    with pytest.raises(LinkClosedError, match="closed"):
        client.open(RequestHead())
    with pytest.raises(LinkClosedError, match="closed"):
        await client.connect()
    await until(lambda: server.num_streams == 0)
    await server.stop()


@on_both_loops
async def test_a_wrong_secret_is_reported_on_both_ends(caplog: pytest.LogCaptureFixture) -> None:
    server = LinkServer(echo, SECRET)
    host, port = await server.start()
    client = LinkClient(host, port, b"guess")
    with pytest.raises(LinkAuthError, match="secrets differ"):
        await client.connect()
    assert "does not know the cluster's secret" in caplog.text
    await client.close()
    await server.stop()


@on_both_loops
async def test_an_unreachable_replica_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = LinkServer(echo, SECRET)
    host, port = await server.start()
    client = LinkClient(host, port, SECRET)
    await client.connect()
    await server.stop()
    await until(lambda: client.failures > 2)
    messages = [
        record.getMessage() for record in caplog.records if record.name.endswith("link.client")
    ]
    assert len(messages) == 1
    assert messages[0].startswith(f"link to {host}:{port}: cannot reach")
    await client.close()


@on_both_loops
async def test_a_replica_without_the_secret_is_rejected() -> None:
    async def impostor(peer: RawPeer) -> None:
        handshake = handshakes.Handshake("server", b"guess", 1000)
        proof = f.encode_frame(0, f.AUTH, 0, bytes(32))
        peer.writer.write(handshake.hello() + proof)
        await peer.wait_closed_by_peer()

    async with raw_server(impostor) as (host, port):
        client = LinkClient(host, port, SECRET)
        with pytest.raises(LinkAuthError, match="does not know"):
            await client.connect()
        await client.close()


@on_both_loops
async def test_another_protocol_version_is_reported() -> None:
    async def newer(peer: RawPeer) -> None:
        peer.writer.write(f.encode_frame(0, f.HELLO, 0, b"TNDM\x07\x00and more"))
        await peer.wait_closed_by_peer()

    async with raw_server(newer) as (host, port):
        client = LinkClient(host, port, SECRET)
        with pytest.raises(LinkProtocolError, match="version 7"):
            await client.connect()
        await client.close()


HELLO = handshakes.Handshake("client", SECRET, 1000).hello()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        bytes(100),
        HELLO + HELLO,
        HELLO + f.encode_frame(0, f.AUTH, 0, bytes(32)),
        f.encode_frame(1, f.REQUEST, f.END, f.encode_head(RequestHead())),
        f.pack_header(handshakes.PRE_AUTH_BYTES + 1, 0, f.HELLO, 0),
        f.encode_frame(0, f.PING) * 100,
        HELLO[:20],
        b"",
    ],
    ids=["http", "zeros", "twice", "guess", "request", "huge", "flood", "half", "silence"],
)
@on_both_loops
async def test_a_stranger_is_disconnected_and_others_are_unaffected(sent: bytes) -> None:
    options = LinkOptions(handshake_timeout_s=0.2)
    async with linked(echo, options=options) as (server, client):
        stranger = await RawPeer.dial(server.address)
        stranger.writer.write(sent)
        await stranger.wait_closed_by_peer()
        await stranger.close()
        assert await ask(client, "/", b"still here") == (200, b"still here")
        await until(lambda: len(server.connections) == 1)


REQUEST = f.encode_frame(1, f.REQUEST, 0, f.encode_head(RequestHead()))


@pytest.mark.parametrize(
    "sent",
    [
        f.pack_header(f.MAX_PAYLOAD_BYTES + 1, 1, f.REQUEST, 0),
        f.encode_frame(1, f.REQUEST, 0, b"\xc1"),
        f.encode_frame(0, f.REQUEST, 0, f.encode_head(RequestHead())),
        REQUEST + REQUEST,
        REQUEST + f.encode_frame(1, f.BODY, f.END) * 2,
        REQUEST + f.encode_frame(1, f.BODY, 0, bytes(f.MAX_PAYLOAD_BYTES)) * 2,
        REQUEST + f.encode_frame(1, f.WINDOW, 0, b"123"),
        f.encode_frame(1, f.DATA, 0, b"x"),
        f.encode_frame(0, 99),
    ],
    ids=["huge", "head", "id0", "reuse", "after-end", "window", "credit", "kind", "unknown"],
)
@on_both_loops
async def test_a_protocol_violation_by_a_router_closes_only_its_connection(sent: bytes) -> None:
    async def sleepy(scope: object, receive: object, send: object) -> None:
        await asyncio.Future()

    async with linked(sleepy) as (server, client):
        stream = client.open(RequestHead())
        await until(lambda: server.num_streams == 1)
        peer = await RawPeer.dial(server.address)
        await peer.shake("client")
        peer.writer.write(sent)
        await peer.wait_closed_by_peer()
        await peer.close()
        await until(lambda: server.num_streams == 1 and len(server.connections) == 1)
        assert client.connected
        assert not stream.ended


@pytest.mark.parametrize(
    "sent",
    [
        f.pack_header(f.MAX_PAYLOAD_BYTES + 1, 1, f.DATA, 0),
        f.encode_frame(1, f.DATA, 0, b"before the head"),
        f.encode_frame(1, f.RESPONSE, 0, f.encode_head(f.ResponseHead(200))) * 2,
        f.encode_frame(1, f.RESPONSE, 0, f.encode_head(f.ResponseHead(200)))
        + f.encode_frame(1, f.DATA, f.JOURNAL, b"\xff\xff"),
        f.encode_frame(1, f.RESPONSE, 0, f.encode_head(f.ResponseHead(200)))
        + f.encode_frame(1, f.DATA, 0, bytes(f.MAX_PAYLOAD_BYTES)) * 2,
        f.encode_frame(1, f.ERROR, 0, b"\x01"),
        f.encode_frame(1, f.REQUEST, 0, b""),
    ],
    ids=["huge", "no-head", "two-heads", "journal", "window", "error", "kind"],
)
@on_both_loops
async def test_a_protocol_violation_by_a_replica_closes_its_connection(sent: bytes) -> None:
    async def rude(peer: RawPeer) -> None:
        await peer.shake("server")
        while (await peer.next_frame())[1] != f.REQUEST:
            pass
        peer.writer.write(sent)
        await peer.wait_closed_by_peer()

    async with raw_server(rude) as (host, port):
        client = LinkClient(host, port, SECRET)
        await client.connect()
        lost = asyncio.Event()
        client.on_state = lambda state: lost.set()
        stream = client.open(RequestHead())
        await lost.wait()
        assert isinstance(client.last_error, LinkProtocolError)
        with pytest.raises(LinkClosedError):
            await read_all(stream)
        await client.close()


@on_both_loops
async def test_tls_with_ray_files_rejects_strangers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "asyncio")
    contexts = tls_contexts(certificates(tmp_path / "ours"))
    others = tls_contexts(certificates(tmp_path / "theirs"))
    assert contexts is not None
    assert others is not None
    tomorrow = time.time() + 86400
    assert certificate_expiry(contexts) == pytest.approx(tomorrow, abs=300)
    assert certificate_expiry(TlsContexts(contexts[0], others[1])) == 0
    server = LinkServer(echo, SECRET, ssl=contexts[0])
    host, port = await server.start()
    client = LinkClient(host, port, SECRET, ssl=contexts[1])
    await client.connect()
    assert await ask(client, "/", b"x" * 1_000_000) == (200, b"x" * 1_000_000)
    stranger = LinkClient(host, port, SECRET, ssl=others[1])
    with pytest.raises(LinkClosedError):
        await stranger.connect(timeout_s=0.3)
    plain = LinkClient(host, port, SECRET)
    with pytest.raises((LinkClosedError, LinkProtocolError)):
        await plain.connect(timeout_s=0.3)
    for each in (client, stranger, plain):
        await each.close()
    await server.stop()


class FaultyClient(LinkClient):
    """Link whose first attempts to connect fail by a defect."""

    num_faults = 2

    def new_connection(self) -> ClientConnection:
        async def fail() -> None:
            raise RuntimeError("planted")

        connection = super().new_connection()
        if self.num_faults:
            self.num_faults -= 1
            connection.wait_ready = fail  # type: ignore[method-assign]
        return connection


async def test_a_defect_does_not_end_the_attempts_to_connect(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = LinkServer(echo, SECRET)
    host, port = await server.start()
    client = FaultyClient(host, port, SECRET)
    await client.connect()
    assert await ask(client, body=b"hello") == (200, b"hello")
    await client.close()
    await server.stop()
    assert "planted" in caplog.text


@on_both_loops
async def test_a_lost_link_is_not_connected_when_its_streams_end() -> None:
    """A queued request that gets a slot of a failed stream must not go to the dead replica."""
    async with linked(hang) as (server, client):
        streams = [client.open(RequestHead()) for _ in range(2)]
        connected: list[bool] = []
        for stream in streams:
            await stream.read()
            stream.on_finished = lambda: connected.append(client.connected)
        for connection in list(server.connections):
            connection.fail(LinkClosedError("killed"))
        await until(lambda: len(connected) == 2)
        assert connected == [False, False]
