"""How both ends of a link prove that they know the cluster's secret, before anything else.

Each end sends HELLO at once. The client then sends AUTH, the server checks it and answers with
its own AUTH; each is an HMAC-SHA256 with the secret over the sender's role and both hellos (so
over both versions, windows and nonces: neither a replay nor a reflection helps). The client goes
first, so a stranger that dials a replica gets nothing made with the secret. Sans I/O.

Also the TLS contexts for a cluster whose own connections use TLS (``RAY_USE_TLS``).
"""

import hashlib
import hmac
import secrets
import ssl
from collections.abc import Mapping
from struct import Struct
from typing import Literal, NamedTuple

from cluster.errors import ConfigError, LinkAuthError, LinkProtocolError
from cluster.link.frames import AUTH, ERROR, HELLO, encode_frame, encode_head

VERSION = 2
PRE_AUTH_BYTES = 512
"""A peer may send this much in all before it has proved itself (it needs 94)."""

Role = Literal["client", "server"]

_MAGIC = b"TNDM"
_PREFIX = Struct("<4sH")  # the same in every version
_HELLO = Struct("<4sHI32s")
_PEER: dict[Role, Role] = {"client": "server", "server": "client"}


class Handshake:
    """One end's part. ``nonce`` (32 bytes) is given by tests alone.

    Raises:
        ConfigError: the secret is empty.
    """

    def __init__(
        self, role: Role, secret: bytes, window_bytes: int, nonce: bytes | None = None
    ) -> None:
        if not secret:
            raise ConfigError("the link's secret must not be empty")
        self.done = False
        self.peer_window_bytes = 0
        """Initial credit on each stream; valid once ``done``."""
        self._role = role
        self._secret = secret
        own = _HELLO.pack(_MAGIC, VERSION, window_bytes, nonce or secrets.token_bytes(32))
        self._hellos: dict[Role, bytes] = {role: own}

    def hello(self) -> bytes:
        """The bytes to send when the connection is made."""
        return encode_frame(0, HELLO, 0, self._hellos[self._role])

    def refusal(self) -> bytes:
        """The bytes to send before closing on a LinkAuthError."""
        return encode_frame(0, ERROR, 0, encode_head((401, "wrong secret")))

    def receive(self, kind: int, payload: bytes) -> bytes:
        """Take the peer's next frame; returns the bytes to send now.

        Raises:
            LinkProtocolError: no frame of this handshake, or another version.
            LinkAuthError: the peer does not know the secret, or says that this end does not.
        """
        if _PEER[self._role] not in self._hellos:
            if kind != HELLO:
                raise LinkProtocolError(f"the peer began with a frame of kind {kind}, not HELLO")
            return self._receive_hello(payload)
        if kind == ERROR:
            raise LinkAuthError("the peer refused this end's proof: the secrets differ")
        if kind != AUTH:
            raise LinkProtocolError(f"a frame of kind {kind} before the peer's AUTH")
        if not hmac.compare_digest(payload, self._proof(_PEER[self._role])):
            raise LinkAuthError("the peer does not know the cluster's secret")
        self.done = True
        return self._auth() if self._role == "server" else b""

    def _receive_hello(self, payload: bytes) -> bytes:
        if len(payload) < _PREFIX.size or not payload.startswith(_MAGIC):
            raise LinkProtocolError("the peer does not speak the link's protocol")
        version = _PREFIX.unpack_from(payload)[1]
        if version != VERSION:
            raise LinkProtocolError(
                f"the peer speaks version {version} of the link, this end version {VERSION}"
            )
        if len(payload) != _HELLO.size:
            raise LinkProtocolError(f"a HELLO carries {_HELLO.size} bytes, not {len(payload)}")
        self.peer_window_bytes = _HELLO.unpack(payload)[2]
        if not self.peer_window_bytes:
            raise LinkProtocolError("the peer's window is 0 bytes")
        self._hellos[_PEER[self._role]] = payload
        return self._auth() if self._role == "client" else b""

    def _auth(self) -> bytes:
        return encode_frame(0, AUTH, 0, self._proof(self._role))

    def _proof(self, role: Role) -> bytes:
        said = b"tandem link\0" + role.encode() + self._hellos["client"] + self._hellos["server"]
        return hmac.digest(self._secret, said, hashlib.sha256)


class TlsContexts(NamedTuple):
    """One context for each end of a link."""

    server: ssl.SSLContext
    client: ssl.SSLContext


def tls_contexts(env: Mapping[str, str]) -> TlsContexts | None:
    """The contexts that Ray's TLS variables describe; None where TLS is off.

    Both ends show a certificate of the cluster's CA. Host names are not checked: replicas move
    between nodes, and a certificate of this CA is what makes a member, as in Ray itself.

    Raises:
        ConfigError: a variable is missing or its file cannot be used.
    """
    if env.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    cert, key, authority = (
        _tls_path(env, name)
        for name in ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    for context in (server, client):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_cert_chain(cert, key)
            context.load_verify_locations(authority)
        except OSError as problem:
            raise ConfigError(
                f"RAY_TLS_SERVER_CERT={cert}, RAY_TLS_SERVER_KEY={key}, "
                f"RAY_TLS_CA_CERT={authority}: {problem}"
            ) from None
    return TlsContexts(server, client)


def _tls_path(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        raise ConfigError(f"RAY_USE_TLS is on, so {name} must name a file")
    return env[name]
