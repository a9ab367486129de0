"""Coverage-guided fuzzing of both ends of a link: `python -m tests.fuzz.link replica|router`.

After a valid handshake, the peer sends frames of every kind on a few streams, or arbitrary bytes,
in pieces of any size. Nothing may be raised, the connection must be open or have ended with a typed
error, and no stream may stay open after its end. Further arguments are libFuzzer's, such as
-max_total_time=300.
"""

import asyncio
import logging
import sys
from contextlib import suppress
from typing import Any, cast

import atheris

from cluster.load import Load
from cluster.usage import Usage

with atheris.instrument_imports(include=["cluster.link"]):
    from cluster.link import LinkClient, LinkServer, PrefixEvents, RequestHead
    from cluster.link import frames as f
    from cluster.link.handshake import Handshake, Role

from cluster.asgi import Receive, Scope, Send
from cluster.errors import LinkError, RequestError

SECRET = b"fuzz"
HEADS = (
    f.encode_head(RequestHead(path="/x")),
    f.encode_head(f.ResponseHead(200, [(b"a", b"b")])),
    f.encode_head(Load(1, 2, 0.5, 3)),
    f.encode_head(Usage(1, 2, 3)),
    f.encode_head((503, "gone")),
    f.encode_credit(1000),
    f.encode_head(RequestHead(path="/x", keeps_journal=True, resume=f.Resume(3, 4, 5))),
    b"\x03123abc",
    f.encode_prefixes(0, PrefixEvents(stored=[1, 2**64 - 1], cleared=True)),
    f.encode_prefixes(1, PrefixEvents(stored=[3], removed=[1, 2])),
)


class FakeTransport:
    """Transport that records writes."""

    def __init__(self) -> None:
        self.protocol: Any = None
        self.written = bytearray()

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        protocol, self.protocol = self.protocol, None
        if protocol is not None:
            asyncio.get_running_loop().call_soon(protocol.connection_lost, None)

    abort = close

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str) -> tuple[str, int]:
        return ("127.0.0.1", 1)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Echo the request's body until the end or a disconnect."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while (message := await receive())["type"] == "http.request":
        more = message.get("more_body", False)
        body = {"type": "http.response.body", "body": message["body"], "more_body": more}
        await send(body)
        if not more:
            return


def hostile_bytes(data: atheris.FuzzedDataProvider) -> bytes:
    """Return the next input: mostly whole frames, to reach the code behind the decoder."""
    if data.ConsumeIntInRange(0, 9) == 0:
        return data.ConsumeBytes(data.ConsumeIntInRange(0, 40))
    stream_id = data.ConsumeIntInRange(0, 3)
    kind, flags = data.ConsumeIntInRange(0, 17), data.ConsumeIntInRange(0, 7)
    if data.ConsumeBool():
        payload = data.PickValueInList(list(HEADS))
    else:
        payload = data.ConsumeBytes(data.ConsumeIntInRange(0, 40))
    return f.encode_frame(stream_id, kind, flags, payload)


def complete_handshake(connection: Any, transport: FakeTransport, role: Role) -> None:
    """Complete the handshake as a valid peer."""
    peer, decoder = Handshake(role, SECRET, 5000), f.FrameDecoder()
    connection.data_received(peer.hello())
    while not peer.done:
        received = bytes(transport.written)
        transport.written.clear()
        for _, kind, _, payload in decoder.feed(received):
            if not peer.done:
                connection.data_received(peer.receive(kind, payload))


async def attack(connection: Any, data: atheris.FuzzedDataProvider, role: Role) -> None:
    """Run one connection from handshake to close."""
    transport = FakeTransport()
    transport.protocol = connection
    connection.connection_made(cast(asyncio.BaseTransport, transport))
    complete_handshake(connection, transport, role)
    while data.remaining_bytes() and connection.error is None:
        piece = hostile_bytes(data)
        cut = data.ConsumeIntInRange(0, len(piece))
        for part in (piece[:cut], piece[cut:]):
            if part and connection.error is None:
                connection.data_received(part)
        if data.ConsumeBool():
            await asyncio.sleep(0)
    assert connection.error is None or isinstance(connection.error, LinkError)
    transport.close()
    await connection.wait_closed()


async def attack_replica(data: atheris.FuzzedDataProvider) -> None:
    """Attack a replica after authenticating as a router."""
    server = LinkServer(app, SECRET)
    await attack(server.new_connection(), data, "client")
    async with asyncio.timeout(5):
        while server.num_streams:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert not server.connections


async def attack_router(data: atheris.FuzzedDataProvider) -> None:
    """Attack a router with three open streams after authenticating as a replica."""
    client = LinkClient("127.0.0.1", 1, SECRET)
    received: list[PrefixEvents] = []
    connection = client.new_connection()
    client.on_prefixes = received.append
    streams: list[Any] = []
    client.on_state = lambda _: (
        streams
        or streams.extend(client.open(RequestHead(), b"x" * size) for size in (0, 10, 100_000))
    )
    await attack(connection, data, "server")
    for stream in streams:
        async with asyncio.timeout(5):  # each stream ends, with an error or without
            with suppress(LinkError, RequestError):
                await stream.head()
                while await stream.read():
                    pass
        assert stream.ended
    assert not connection.streams
    assert all(0 <= prefix < 2**64 for e in received for prefix in (*e.stored, *e.removed))
    async with asyncio.timeout(5):
        await client.close()


def main() -> None:
    """Fuzz one end, given by the first argument."""
    target = {"replica": attack_replica, "router": attack_router}[sys.argv.pop(1)]
    logging.disable()  # every closed connection logs its reason
    runner = asyncio.Runner()

    def one(data: bytes) -> None:
        problems: list[Any] = []
        loop = runner.get_loop()
        loop.set_exception_handler(lambda _, context: problems.append(context))
        runner.run(target(atheris.FuzzedDataProvider(data)))
        assert not problems, problems

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
