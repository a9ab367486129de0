"""What one streamed chunk costs on the link, for each end alone.

An instant ASGI application answers concurrent streams; router and replica run in two processes,
so each end's CPU time is its own. Prints; asserts nothing.

    python scripts/bench_link.py [--uvloop] [--pace] [--profile router|replica]
"""

import argparse
import asyncio
import cProfile
import multiprocessing
import pstats
import time
from collections.abc import Coroutine
from multiprocessing.connection import Connection
from typing import Any

from cluster.asgi import Message, Receive, Scope, Send
from cluster.link import LinkClient, LinkServer, RequestHead

SECRET = b"benchmark"


class Replica:
    """Answers with chunks: all at once, or one to every stream at each step of an engine."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._body = b"x" * args.chunk_bytes
        self._waiting: list[asyncio.Future[None]] = []

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application."""
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(self._args.chunks):
            if self._args.pace:
                await self._next_step()
            message: Message = {
                "type": "http.response.body",
                "body": self._body,
                "more_body": True,
            }
            await send(message)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next_step(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_later(self._args.pace / 1000, self._end_step)
        waiter = loop.create_future()
        self._waiting.append(waiter)
        await waiter

    def _end_step(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.set_result(None)


async def serve(args: argparse.Namespace, pipe: Connection) -> None:
    """The replica's process."""
    server = LinkServer(Replica(args).app, SECRET)
    pipe.send(await server.start())
    await asyncio.to_thread(pipe.recv)
    pipe.send(time.process_time())
    await asyncio.to_thread(pipe.recv)
    pipe.send(time.process_time())
    await server.stop()


async def ask(client: LinkClient, args: argparse.Namespace) -> int:
    """One stream to its end; returns its bytes."""
    stream = client.open(RequestHead(method="POST", path="/"), b"{}")
    await stream.head()
    size = 0
    while data := await stream.read():
        size += len(data)
    return size


async def drive(args: argparse.Namespace, pipe: Connection) -> None:
    """The router's process."""
    host, port = pipe.recv()
    client = LinkClient(host, port, SECRET)
    await client.connect()
    expected = args.chunks * args.chunk_bytes

    async def worker(rounds: int) -> None:
        for _ in range(rounds):
            assert await ask(client, args) == expected

    await asyncio.gather(*(worker(2) for _ in range(args.streams)))
    pipe.send("begin")
    replica_before = await asyncio.to_thread(pipe.recv)
    before, clock = time.process_time(), time.perf_counter()
    await asyncio.gather(*(worker(args.rounds) for _ in range(args.streams)))
    wall_s, router_s = time.perf_counter() - clock, time.process_time() - before
    pipe.send("end")
    replica_s = await asyncio.to_thread(pipe.recv) - replica_before
    chunks = args.streams * args.rounds * args.chunks
    print(
        f"{chunks / wall_s:10,.0f} chunks/s   CPU for each chunk: "
        f"router {router_s / chunks * 1e6:.2f} us, replica {replica_s / chunks * 1e6:.2f} us"
    )
    await client.close()


def run(main: Coroutine[Any, Any, None], args: argparse.Namespace, name: str) -> None:
    """Run one process' part on the loop that was asked for, under the profiler if asked for."""
    profile = cProfile.Profile() if args.profile == name else None
    if profile:
        profile.enable()
    if args.uvloop:
        import uvloop

        uvloop.run(main)
    else:
        asyncio.run(main)
    if profile:
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(22)


def replica_process(args: argparse.Namespace, pipe: Connection) -> None:
    """Entry of the replica's process."""
    run(serve(args, pipe), args, "replica")


def main() -> None:
    """Read the command line, start the replica, drive it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--uvloop", action="store_true")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--chunks", type=int, default=128)
    parser.add_argument("--chunk-bytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--pace", type=float, default=0, help="ms of an engine step; 0: instant")
    parser.add_argument("--profile", choices=["router", "replica"])
    args = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    replica = multiprocessing.Process(target=replica_process, args=(args, theirs))
    replica.start()
    run(drive(args, ours), args, "router")
    replica.join()


if __name__ == "__main__":
    main()
