"""Fetching by URL: limits, and no way to services that are not public."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config import MediaConfig
from cluster.engines.media_fetch import (
    MediaFailedError,
    MediaFetcher,
    MediaRefusedError,
    Resolve,
    is_public,
    resolve_host,
)

IMAGE = b"\x89PNG image"
HOST = "images.example.com"
Answers = dict[str, bytes]


class Server:
    """HTTP server on loopback with fixed answers by path."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.requests: list[str] = []
        """Paths and hosts of the requests."""
        self.port = 0
        self.stalls = asyncio.Event()
        """Never set."""
        self.min_open = 0
        """Requests that must be open together before the first is answered."""
        self.most_open = 0
        self._num_open = 0
        self._enough = asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ")[1]
        host = head.lower().partition("host: ")[2].partition("\r\n")[0]
        self.requests.append(f"{host}{path}")
        await self._count()
        writer.write(self.answers[path])
        while path == "/endless":
            writer.write(b"x" * 1024)
            await writer.drain()
        if path == "/stalls":
            await reader.read()  # until the client leaves
        self._num_open -= 1

    async def _count(self) -> None:
        self._num_open += 1
        self.most_open = max(self.most_open, self._num_open)
        if self._num_open >= self.min_open:
            self._enough.set()
        await self._enough.wait()
        for _ in range(self.min_open * 10):  # time for requests beyond the limit
            await asyncio.sleep(0.01)


def ok(body: bytes = IMAGE, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(target: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Moved\r\nlocation: {target}\r\ncontent-length: 0\r\n\r\n".encode()


@asynccontextmanager
async def serving(answers: Answers) -> AsyncIterator[Server]:
    server = Server(answers)

    connections: set[asyncio.Task[None]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (task := asyncio.current_task()) is not None:
            connections.add(task)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await server.answer(reader, writer)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1") as running:
        server.port = running.sockets[0].getsockname()[1]
        yield server
        await asyncio.gather(*connections)


def fetcher(server: Server, resolve: Resolve | None = None, **fields: Any) -> MediaFetcher:
    config = {
        "allowed_domains": [f"{HOST}:{server.port}", f"other.example.com:{server.port}"],
        "allowed_networks": ["127.0.0.0/8"],
        "timeout_s": 60,
        **fields,
    }
    return MediaFetcher(MediaConfig.model_validate(config), (), resolve or to_loopback)


async def to_loopback(host: str, port: int) -> Sequence[str]:
    return ["127.0.0.1"]


def resolving_to(*addresses: str) -> Resolve:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return addresses

    return resolve


async def test_a_file_of_an_allowed_host() -> None:
    async with serving({"/a.png": ok(), "/empty": ok(b"")}) as server:
        url = f"http://{HOST}:{server.port}"
        assert await fetcher(server).fetch(f"{url}/a.png") == IMAGE
        assert await fetcher(server).fetch(f"{url}/empty") == b""
        assert server.requests[0] == f"{HOST}:{server.port}/a.png"


async def test_without_allowed_hosts_nothing_is_fetched() -> None:
    async with serving({"/": ok()}) as server:
        url = f"http://127.0.0.1:{server.port}/"
        with pytest.raises(MediaRefusedError, match="does not fetch URLs"):
            await MediaFetcher(MediaConfig()).fetch(url)
        assert not server.requests


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.example.com/",
        "http://images.example.com.evil.com/",
        "http://evil-images.example.com/",
        "http://example.com/",
        "http://a.cdn.example.com:8080/",
        "http://cdn.example.com/",  # the wildcard names hosts below
        f"http://{HOST}:22/",
        f"http://{HOST}@evil.example.com/",
        f"http://user:password@{HOST}/",
        f"http://evil.example.com#@{HOST}/",
        f"http://evil.example.com\\@{HOST}/",
        f"ftp://{HOST}/",
        f"gopher://{HOST}/",
        "file:///etc/passwd",
        "javascript:alert(1)",
        f"//{HOST}/",
        "images.example.com/a.png",
        "http://",
        "http:///a.png",
        "http://[::1/",
        "",
        "http://" + "a" * 100_000,
        "http://\x00/",
    ],
)
async def test_urls_that_are_not_allowed(url: str) -> None:
    async with serving({}) as server:
        config = MediaConfig(
            allowed_domains=(HOST, "*.cdn.example.com"), allowed_networks=("127.0.0.0/8",)
        )
        with pytest.raises(MediaRefusedError) as caught:
            await MediaFetcher(config, (), to_loopback).fetch(url)
        assert caught.value.status == 400
        assert not server.requests


async def test_hosts_below_a_wildcard_and_other_hosts_of_the_caller() -> None:
    async with serving({"/": ok()}) as server:
        port = server.port
        wild = fetcher(server, allowed_domains=[f"*.cdn.example.com:{port}"])
        assert await wild.fetch(f"http://A.b.cdn.example.com:{port}/") == IMAGE
        config = MediaConfig(allowed_networks=("127.0.0.1/32",))
        own = MediaFetcher(config, [f"mine.example.com:{port}"], to_loopback)
        assert await own.fetch(f"http://mine.example.com:{port}/") == IMAGE


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1"),
        *("239.1.1.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fc00::1"),
        *("fd00:ec2::254", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1"),
        *("::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::1"),
        *("2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1", "fe80::1%1"),
    ],
)
async def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))
    async with serving({"/": ok()}) as server:
        config = MediaConfig(allowed_domains=(f"{HOST}:{server.port}",))
        for addresses in ([address], ["93.184.216.34", address]):
            with pytest.raises(MediaRefusedError, match="no public address"):
                await MediaFetcher(config, (), resolving_to(*addresses)).fetch(
                    f"http://{HOST}:{server.port}/"
                )
        assert not server.requests


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "1.1.1.1", "2606:4700::1111", "64:ff9b::101:101"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0", "[::1]"],
)
async def test_spellings_of_loopback_with_every_host_allowed(host: str) -> None:
    async with serving({"/": ok()}) as server:
        config = MediaConfig(allowed_domains=(f"*:{server.port}",))
        with pytest.raises((MediaRefusedError, MediaFailedError)):
            await MediaFetcher(config).fetch(f"http://{host}:{server.port}/")
        assert not server.requests


async def test_the_connection_is_made_to_the_address_that_was_checked() -> None:
    """A name server that answers differently the second time changes nothing."""
    answers = iter([["127.0.0.1"], ["10.1.1.1"]])

    async def rebinding(host: str, port: int) -> Sequence[str]:
        return next(answers)

    async with serving({"/": ok()}) as server:
        assert await fetcher(server, rebinding).fetch(f"http://{HOST}:{server.port}/") == IMAGE
        assert next(answers) == ["10.1.1.1"]  # asked once


async def test_the_next_address_is_tried() -> None:
    async with serving({"/": ok()}) as server:
        found = await fetcher(server, resolving_to("127.0.0.9", "127.0.0.1")).fetch(
            f"http://{HOST}:{server.port}/"
        )
        assert found == IMAGE


async def test_redirects_within_the_allowed_hosts() -> None:
    answers = {"/a": redirect("/b", 301), "/c": ok()}
    async with serving(answers) as server:
        answers["/b"] = redirect(f"http://other.example.com:{server.port}/c", 307)
        assert await fetcher(server).fetch(f"http://{HOST}:{server.port}/a") == IMAGE
        assert server.requests[-1] == f"other.example.com:{server.port}/c"


@pytest.mark.parametrize(
    "target",
    [
        *("http://evil.example.com/", "http://127.0.0.1/", "http://169.254.169.254/latest"),
        *("file:///etc/passwd", "ftp://images.example.com/", "//evil.example.com/", "http://[::1"),
        "http://user@images.example.com/",
    ],
)
async def test_redirects_elsewhere_are_refused(target: str) -> None:
    async with serving({"/a": redirect(target)}) as server:
        with pytest.raises(MediaRefusedError):
            await fetcher(server).fetch(f"http://{HOST}:{server.port}/a")
        assert len(server.requests) == 1


async def test_a_redirect_to_an_allowed_host_with_a_private_address() -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.1" if host == HOST else "10.0.0.1"]

    answers: Answers = {}
    async with serving(answers) as server:
        answers["/a"] = redirect(f"http://other.example.com:{server.port}/a")
        with pytest.raises(MediaRefusedError, match="no public address"):
            await fetcher(server, resolve).fetch(f"http://{HOST}:{server.port}/a")


async def test_redirects_in_a_circle_end() -> None:
    async with serving({"/a": redirect("/a")}) as server:
        with pytest.raises(MediaFailedError, match="more than 2 times"):
            await fetcher(server, max_redirects=2).fetch(f"http://{HOST}:{server.port}/a")
        assert len(server.requests) == 3


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
FAILURES = {
    "too large": (ok(b"x" * 2000), "larger than 1024 bytes"),
    "too large, without a length": (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 2000, "larger"),
    "too large, in chunks": (CHUNKED + b"7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n", "larger"),
    "not found": (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", "status 404"),
    "partial": (b"HTTP/1.1 206 Partial\r\ncontent-length: 0\r\n\r\n", "status 206"),
    "compressed": (ok(IMAGE, "content-encoding: gzip"), "compressed"),
    "shorter than declared": (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc", "cannot"),
    "not HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "cannot be fetched"),
    "a huge header": (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000 + b"\r\n\r\n", "cannot"),
    "nothing": (b"", "cannot be fetched"),
}


@pytest.mark.parametrize("case", FAILURES)
async def test_answers_that_are_not_accepted(case: str) -> None:
    answer, message = FAILURES[case]
    async with serving({"/a": answer}) as server:
        with pytest.raises(MediaFailedError, match=message) as caught:
            await fetcher(server, max_bytes=1024).fetch(f"http://{HOST}:{server.port}/a")
        assert (caught.value.status, caught.value.param) == (400, "url")


async def test_an_endless_file_ends_at_the_limit() -> None:
    async with serving({"/endless": b"HTTP/1.1 200 OK\r\n\r\n"}) as server:
        with pytest.raises(MediaFailedError, match="larger than"):
            await fetcher(server, max_bytes=100_000).fetch(f"http://{HOST}:{server.port}/endless")


async def stall(host: str, port: int) -> Sequence[str]:
    await asyncio.Event().wait()
    return []


@pytest.mark.parametrize("resolve", [to_loopback, stall], ids=["answer", "name"])
async def test_a_slow_server_is_given_up(
    resolve: Callable[[str, int], Awaitable[Sequence[str]]],
) -> None:
    async with serving({"/stalls": b"HTTP/1.1 200 OK\r\n"}) as server:
        with pytest.raises(MediaFailedError, match=r"longer than 0\.3 s"):
            await fetcher(server, resolve, timeout_s=0.3).fetch(
                f"http://{HOST}:{server.port}/stalls"
            )


async def test_nothing_listens_and_no_such_name() -> None:
    async def unknown(host: str, port: int) -> Sequence[str]:
        raise OSError("Name or service not known")

    async with serving({}) as server:
        url = f"http://{HOST}:{server.port}/"
        with pytest.raises(MediaFailedError, match="cannot be fetched"):
            await fetcher(server, unknown).fetch(url)
        with pytest.raises(MediaFailedError, match="cannot be fetched"):
            await fetcher(server, resolving_to("127.0.0.9")).fetch(url)


async def test_https_sends_nothing_in_plain_text() -> None:
    """The server speaks no TLS, so the handshake never ends."""
    async with serving({"/": ok()}) as server:
        with pytest.raises(MediaFailedError, match="longer than"):
            await fetcher(server, timeout_s=0.5).fetch(f"https://{HOST}:{server.port}/")
        assert not server.requests


async def test_files_beyond_max_fetches_wait() -> None:
    """The server answers when two requests are open, and leaves time for a third."""
    async with serving({f"/{number}": ok() for number in range(6)}) as server:
        server.min_open = 2
        shared = fetcher(server, max_fetches=2)
        urls = [f"http://{HOST}:{server.port}/{number}" for number in range(6)]
        assert await asyncio.gather(*map(shared.fetch, urls)) == [IMAGE] * 6
        assert server.most_open == 2


async def test_slow_names_do_not_delay_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """More names wait than asyncio has threads; the work in its threads goes on."""
    answer = threading.Event()

    def slow(host: str, *_: Any, **__: Any) -> list[Any]:
        answer.wait(60)
        return [(0, 0, 0, "", (host, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    names = [asyncio.create_task(resolve_host(f"10.0.0.{n}", 80)) for n in range(100)]
    try:
        await asyncio.sleep(0)  # all have begun
        async with asyncio.timeout(30):
            assert await asyncio.to_thread(lambda: "decoded") == "decoded"
        assert not any(each.done() for each in names)
    finally:
        answer.set()
    assert len(await asyncio.gather(*names)) == 100


@pytest.mark.parametrize("host", ["a" * 64 + ".com", "a..com"])
async def test_names_that_cannot_be_looked_up(host: str) -> None:
    with pytest.raises(MediaRefusedError, match="host name"):
        await resolve_host(host, 80)


@pytest.mark.parametrize("domain", ["https://a.com", "a.com/path", "A.com", "", "*a.com", "a_b"])
def test_domains_must_be_host_names(domain: str) -> None:
    with pytest.raises(ValidationError, match="host name in lower case"):
        MediaConfig(allowed_domains=(domain,))
