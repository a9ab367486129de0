"""Fetching of files that requests name by URL, without reaching private services (SSRF).

The host must be in the configuration, and every address that its name resolves to must be public.
The connection is made to an address that was checked, so that a second answer of the name server
changes nothing. Redirects are followed here, with the same checks.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from ssl import SSLContext
from typing import Any

import httpcore
import httpx

from cluster.config.media import MediaConfig
from cluster.errors import InvalidRequestError

Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Returns the addresses of a host and port."""

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = IPv6Network("64:ff9b::/96")
_MAX_ADDRESSES = 4  # of one host that are tried
_MAX_LOOKUPS = 8  # at the same time in one process; a slow name server holds a thread for long
_HEADERS = [("accept-encoding", "identity"), ("user-agent", "tandem")]


class MediaRefusedError(InvalidRequestError):
    """The configuration does not allow a file."""


class MediaFailedError(InvalidRequestError):
    """A file was not delivered, or not within the limits."""


class MediaFetcher:
    """Fetches files within the limits of a configuration; use it on one event loop.

    Args:
        config: Allowed hosts and limits.
        domains: Further allowed hosts.
        resolve: Resolution of names.
    """

    def __init__(
        self, config: MediaConfig, domains: Iterable[str] = (), resolve: Resolve | None = None
    ) -> None:
        self._config = config
        self._domains = (*config.allowed_domains, *domains)
        self._resolve = resolve or resolve_host
        self._limit = asyncio.Semaphore(config.max_fetches)

    async def fetch(self, url: str) -> bytes:
        """Return the content of a file.

        Raises:
            MediaRefusedError: Its host is not allowed, or has an address that is not.
            MediaFailedError: It cannot be fetched, is too large, or takes too long.
        """
        timeout_s = self._config.timeout_s
        try:
            async with asyncio.timeout(timeout_s), self._limit:
                return await self._follow(url)
        except TimeoutError:
            raise MediaFailedError(
                f"Fetching a URL took longer than {timeout_s:g} s (media.timeout_s).", param="url"
            ) from None
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError):
            # The reason would describe the network behind the router.
            raise MediaFailedError("A URL cannot be fetched.", param="url") from None

    async def _follow(self, url: str) -> bytes:
        target = self._check(_parse(url))
        for _ in range(self._config.max_redirects + 1):
            answer = await self._get(target)
            if isinstance(answer, bytes):
                return answer
            target = self._check(_parse(answer, target))
        raise MediaFailedError(
            f"A URL redirects more than {self._config.max_redirects} times (media.max_redirects).",
            param="url",
        )

    def _check(self, url: httpx.URL) -> httpx.URL:
        host = url.raw_host.decode()
        if url.scheme not in _PORTS or not host or url.userinfo:
            raise MediaRefusedError("A URL must have the form http(s)://HOST/PATH.", param="url")
        if not self._domains:
            raise MediaRefusedError(
                "This model does not fetch URLs; send the data in the request, as "
                "`data:image/png;base64,…`.",
                param="url",
            )
        port = url.port or _PORTS[url.scheme]
        if not any(_matches(domain, host, port) for domain in self._domains):
            raise MediaRefusedError(
                f"URLs of {host[:100]} on port {port} are not allowed (media.allowed_domains).",
                param="url",
            )
        return url

    async def _get(self, url: httpx.URL) -> bytes | str:
        """Return the content, or the target of a redirect."""
        # Built from the parts that were checked: another parser might read the text differently.
        target = httpcore.URL(
            scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
        )
        async with (
            _CheckedBackend(self._config, self._resolve) as backend,
            httpcore.AsyncConnectionPool(_ssl_context(), network_backend=backend) as pool,
            pool.stream("GET", target, headers=_HEADERS) as response,
        ):
            headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in headers:
                return headers[b"location"]
            if response.status != 200:
                raise MediaFailedError(
                    f"{url.host} answered a URL with status {response.status}.", param="url"
                )
            if headers.get(b"content-encoding", "identity").lower() != "identity":
                raise MediaFailedError(f"{url.host} compressed its answer.", param="url")
            declared = headers.get(b"content-length", "")
            self._check_size(int(declared) if declared.isdecimal() else 0)
            content = bytearray()
            async for chunk in response.aiter_stream():
                content += chunk
                self._check_size(len(content))
            return bytes(content)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._config.max_bytes:
            raise MediaFailedError(
                f"The file of a URL is larger than {int(self._config.max_bytes)} bytes "
                "(media.max_bytes).",
                param="url",
            )


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were checked."""

    def __init__(self, config: MediaConfig, resolve: Resolve) -> None:
        self._config = config
        self._resolve = resolve
        self._inner = httpcore.AnyIOBackend()
        self._streams: list[httpcore.AsyncNetworkStream] = []

    async def __aenter__(self) -> "_CheckedBackend":
        return self

    async def __aexit__(self, *_: object) -> None:
        for stream in self._streams:  # httpcore leaves one open if a handshake is cancelled
            await stream.aclose()

    async def connect_tcp(
        self, host: str, port: int, *args: Any, **options: Any
    ) -> httpcore.AsyncNetworkStream:
        addresses = [ip_address(each) for each in await self._resolve(host, port)]
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise MediaRefusedError(f"{host[:100]} has no public address.", param="url")
        error: Exception | None = None
        for address in addresses[:_MAX_ADDRESSES]:
            try:
                stream = await self._inner.connect_tcp(str(address), port, *args, **options)
            except httpcore.ConnectError as failed:
                error = failed
            else:
                self._streams.append(stream)
                return stream
        raise error or httpcore.ConnectError(host)

    def _is_allowed(self, address: Address) -> bool:
        mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
        known = mapped or address
        return is_public(known) or any(known in each for each in self._config.allowed_networks)


def is_public(address: Address) -> bool:
    """Return True if an address is in the public internet, also where it is behind NAT64."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
        if address.sixtofour is not None or address.teredo is not None or address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


async def resolve_host(host: str, port: int) -> list[str]:
    """Return the addresses of a host.

    Raises:
        MediaRefusedError: It is no valid host name.
        OSError: It is unknown.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.run_in_executor(_lookups(), _look_up, host, port)
    except UnicodeError:  # from the codec of internationalized names
        raise MediaRefusedError("The host name of a URL is not valid.", param="url") from None
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _look_up(host: str, port: int) -> list[Any]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


@cache
def _lookups() -> ThreadPoolExecutor:
    """Return threads for lookups alone: in asyncio's, slow names would delay the decoding."""
    return ThreadPoolExecutor(_MAX_LOOKUPS, "media-lookup")


def _parse(url: str, base: httpx.URL | None = None) -> httpx.URL:
    try:
        return httpx.URL(url) if base is None else base.join(url)
    except (httpx.InvalidURL, UnicodeError, ValueError):
        raise MediaRefusedError("A URL is not valid.", param="url") from None


def _matches(domain: str, host: str, port: int) -> bool:
    name, _, allowed_port = domain.partition(":")
    if port not in ((int(allowed_port),) if allowed_port else _PORTS.values()):
        return False
    return name in ("*", host) or (name.startswith("*.") and host.endswith(name[1:]))


@cache
def _ssl_context() -> SSLContext:
    return httpx.create_ssl_context()
