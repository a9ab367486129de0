"""The link: one TCP connection for each pair of router and replica, shared by many requests."""

from cluster.link.client import LinkClient, LinkState
from cluster.link.client_stream import Chunk, ClientStream
from cluster.link.connection import LinkCounts, LinkOptions
from cluster.link.frames import PrefixEvents, RequestHead, ResponseHead
from cluster.link.handshake import TlsContexts, certificate_expiry, tls_contexts
from cluster.link.server import DrainResult, LinkServer, PrefixSource
from cluster.link.server_stream import TOKEN_IDS, answer_locally

__all__ = [
    "TOKEN_IDS",
    "Chunk",
    "ClientStream",
    "DrainResult",
    "LinkClient",
    "LinkCounts",
    "LinkOptions",
    "LinkServer",
    "LinkState",
    "PrefixEvents",
    "PrefixSource",
    "RequestHead",
    "ResponseHead",
    "TlsContexts",
    "answer_locally",
    "certificate_expiry",
    "tls_contexts",
]
