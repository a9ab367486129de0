"""CPU cost of one streamed chunk on the link, for router and replica separately.

An instant ASGI application serves concurrent streams. Router and replica run in two processes, so
their CPU times are separate.
"""

import argparse
import asyncio
import contextlib
import cProfile
import multiprocessing
import pstats
import time
from collections.abc import Coroutine, Iterator
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.report import Report, Table
from benchmarks.rounds import Summary
from cluster.asgi import Message, Receive, Scope, Send
from cluster.link import LinkClient, LinkServer, RequestHead

SECRET = b"benchmark"
WARM_UP_PASSES = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--asyncio", action="store_true", help="use asyncio's event loop, not uvloop"
    )
    parser.add_argument("--streams", type=int, default=32, help="concurrent streams")
    parser.add_argument("--chunks", type=int, default=128, help="chunks per stream")
    parser.add_argument("--chunk-bytes", type=int, default=200, help="chunk size in bytes")
    parser.add_argument("--passes", type=int, default=20, help="consecutive streams")
    parser.add_argument(
        "--pace", type=float, default=0, help="duration of an engine step in ms; 0: instant"
    )
    parser.add_argument(
        "--profile", choices=["router", "replica"], help="print a CPU profile of this process"
    )


def run(args: argparse.Namespace) -> Report:
    """Run the streams in each round; report chunks per second and CPU time per chunk."""
    if args.quick:
        args.passes = min(args.passes, 5)
    with _replica(args) as pipe:
        rounds = _run_loop(_drive(args, pipe), args, "router")
    chunks_s, router_us, replica_us = (Summary(column) for column in zip(*rounds, strict=True))
    keys = {
        "link_chunks_s": chunks_s,
        "link_router_us_per_chunk": router_us,
        "link_replica_us_per_chunk": replica_us,
    }
    pace = f"{args.pace:g} ms per step" if args.pace else "instant"
    title = f"{args.streams} streams of {args.chunks} chunks of {args.chunk_bytes} bytes, {pace}"
    columns = ("", "chunks/s", "router µs/chunk", "replica µs/chunk")
    table = Table(title, columns, [("link", chunks_s, router_us, replica_us)])
    return Report(keys, tables=[table])


class ChunkApplication:
    """ASGI application that sends chunks: all at once, or one per engine step to every stream."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._body = b"x" * args.chunk_bytes
        self._waiting: list[asyncio.Future[None]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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


@contextlib.contextmanager
def _replica(args: argparse.Namespace) -> Iterator[Connection]:
    """Run the replica's process; yield the pipe to it."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_replica_process, args=(args, theirs), daemon=True)
    process.start()
    try:
        yield ours
        process.join()
    finally:
        process.kill()
        process.join()


def _replica_process(args: argparse.Namespace, pipe: Connection) -> None:
    with contextlib.suppress(KeyboardInterrupt, EOFError):
        _run_loop(_serve(args, pipe), args, "replica")


async def _serve(args: argparse.Namespace, pipe: Connection) -> None:
    """Serve the link; send the CPU time on request."""
    server = LinkServer(ChunkApplication(args), SECRET)
    pipe.send(await server.start())
    while await asyncio.to_thread(pipe.recv):
        pipe.send(time.process_time())
    await server.stop()


async def _drive(args: argparse.Namespace, pipe: Connection) -> list[tuple[float, float, float]]:
    """Run the router's end; return chunks/s, router µs and replica µs per chunk of each round."""
    host, port = pipe.recv()
    client = LinkClient(host, port, SECRET)
    await client.connect()
    await _run_streams(client, args, WARM_UP_PASSES)
    rounds = [await _run_round(client, args, pipe) for _ in range(args.rounds)]
    pipe.send(False)
    await client.close()
    return rounds


async def _run_round(
    client: LinkClient, args: argparse.Namespace, pipe: Connection
) -> tuple[float, float, float]:
    replica_s = await _replica_cpu_s(pipe)
    router_s, began = time.process_time(), time.perf_counter()
    await _run_streams(client, args, args.passes)
    wall_s, router_s = time.perf_counter() - began, time.process_time() - router_s
    replica_s = await _replica_cpu_s(pipe) - replica_s
    chunks = args.streams * args.passes * args.chunks
    return chunks / wall_s, router_s / chunks * 1e6, replica_s / chunks * 1e6


async def _replica_cpu_s(pipe: Connection) -> float:
    pipe.send(True)
    return float(await asyncio.to_thread(pipe.recv))


async def _run_streams(client: LinkClient, args: argparse.Namespace, passes: int) -> None:
    async def run_passes() -> None:
        for _ in range(passes):
            size = await _run_stream(client)
            if size != args.chunks * args.chunk_bytes:
                raise RuntimeError(
                    f"stream has {size} bytes, expected {args.chunks * args.chunk_bytes}"
                )

    await asyncio.gather(*(run_passes() for _ in range(args.streams)))


async def _run_stream(client: LinkClient) -> int:
    """Read one stream to its end; return its size in bytes."""
    stream = client.open(RequestHead(method="POST", path="/"), b"{}")
    await stream.head()
    size = 0
    while data := await stream.read():
        size += len(data)
    return size


def _run_loop(main: Coroutine[Any, Any, Any], args: argparse.Namespace, name: str) -> Any:
    """Run one process on the chosen event loop, profiled if ``--profile`` names it."""
    profile = cProfile.Profile() if args.profile == name else contextlib.nullcontext()
    with profile, asyncio.Runner(loop_factory=_loop_factory(args)) as runner:
        result = runner.run(main)
    if isinstance(profile, cProfile.Profile):
        pstats.Stats(profile).sort_stats("tottime").print_stats(22)
    return result


def _loop_factory(args: argparse.Namespace) -> Any:
    if args.asyncio:
        return None
    import uvloop

    return uvloop.new_event_loop
