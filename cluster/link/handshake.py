"""Mutual authentication of a link's two ends, and TLS contexts.

Both ends send HELLO at once. The client then sends AUTH; the server verifies it and answers with
its own AUTH. Each AUTH is an HMAC-SHA256, keyed with the cluster's secret, over the sender's role
and both HELLOs, so it covers versions, windows and nonces and can be neither replayed nor
reflected. The client goes first: a stranger that connects to a replica receives nothing derived
from the secret. ``Handshake`` does no I/O.

The TLS contexts are for clusters that encrypt their own connections (``RAY_USE_TLS``).
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
"""Limit of the bytes that an unauthenticated peer may send; the handshake needs 94."""

Role = Literal["client", "server"]

_MAGIC = b"TNDM"
_PREFIX = Struct("<4sH")  # the same in every version
_HELLO = Struct("<4sHI32s")
_PEER: dict[Role, Role] = {"client": "server", "server": "client"}


class Handshake:
    """One end of a handshake; announces its receive window. The nonce is random except in tests.

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
        """Initial credit of each stream; valid once ``done``."""
        self._role = role
        self._secret = secret
        hello = _HELLO.pack(_MAGIC, VERSION, window_bytes, nonce or secrets.token_bytes(32))
        self._hellos: dict[Role, bytes] = {role: hello}

    def hello(self) -> bytes:
        return encode_frame(0, HELLO, 0, self._hellos[self._role])

    def refusal(self) -> bytes:
        """Return the bytes to send before closing after a LinkAuthError."""
        return encode_frame(0, ERROR, 0, encode_head((401, "wrong secret")))

    def receive(self, kind: int, payload: bytes) -> bytes:
        """Process the peer's next frame and return the bytes to send.

        Raises:
            LinkProtocolError: an unexpected frame, or another protocol version.
            LinkAuthError: the peer does not know the secret, or rejects this end's proof.
        """
        if _PEER[self._role] not in self._hellos:
            if kind != HELLO:
                raise LinkProtocolError(f"the peer sent a frame of kind {kind} instead of HELLO")
            return self._receive_hello(payload)
        if kind == ERROR:
            raise LinkAuthError("the peer rejected this end's proof: the secrets differ")
        if kind != AUTH:
            raise LinkProtocolError(f"the peer sent a frame of kind {kind} before its AUTH")
        if not hmac.compare_digest(payload, self._proof(_PEER[self._role])):
            raise LinkAuthError("the peer does not know the cluster's secret")
        self.done = True
        return self._auth() if self._role == "server" else b""

    def _receive_hello(self, payload: bytes) -> bytes:
        if len(payload) < _PREFIX.size or not payload.startswith(_MAGIC):
            raise LinkProtocolError("the peer does not speak the link protocol")
        version = _PREFIX.unpack_from(payload)[1]
        if version != VERSION:
            raise LinkProtocolError(
                f"the peer speaks version {version} of the link protocol, this end version "
                f"{VERSION}"
            )
        if len(payload) != _HELLO.size:
            raise LinkProtocolError(f"a HELLO carries {_HELLO.size} bytes, not {len(payload)}")
        self.peer_window_bytes = _HELLO.unpack(payload)[2]
        if not self.peer_window_bytes:
            raise LinkProtocolError("the peer announced a window of 0 bytes")
        self._hellos[_PEER[self._role]] = payload
        return self._auth() if self._role == "client" else b""

    def _auth(self) -> bytes:
        return encode_frame(0, AUTH, 0, self._proof(self._role))

    def _proof(self, role: Role) -> bytes:
        signed = b"tandem link\0" + role.encode() + self._hellos["client"] + self._hellos["server"]
        return hmac.digest(self._secret, signed, hashlib.sha256)


class TlsContexts(NamedTuple):
    """One context for each end of a link."""

    server: ssl.SSLContext
    client: ssl.SSLContext


def uses_tls(env: Mapping[str, str]) -> bool:
    """Return True if Ray and links use TLS."""
    return env.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def tls_contexts(env: Mapping[str, str]) -> TlsContexts | None:
    """Return the contexts that Ray's TLS variables describe, or None if TLS is off.

    Raises:
        ConfigError: a variable is missing or its file cannot be used.
    """
    if not uses_tls(env):
        return None
    cert, key, authority = (
        _tls_path(env, name)
        for name in ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Replicas move between nodes. As in Ray, a certificate of the cluster's CA proves membership.
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


def certificate_expiry(tls: TlsContexts) -> float:
    """Return the Unix time at which this process' certificate expires; 0 if it is not valid."""
    # The ssl module cannot read a certificate file, so take it from a handshake in memory.
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = tls.client.wrap_bio(to_client, to_server)
    server = tls.server.wrap_bio(to_server, to_client, server_side=True)
    for end in (client, server, client):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError:
            return 0.0
    certificate = client.getpeercert()
    assert certificate is not None
    return float(ssl.cert_time_to_seconds(str(certificate["notAfter"])))


def _tls_path(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        raise ConfigError(f"RAY_USE_TLS is on, so {name} must name a file")
    return env[name]
