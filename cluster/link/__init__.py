"""The link: one TCP connection for each pair of router and replica, with many requests on it."""

from cluster.link.certificate import certificate_expiry
from cluster.link.client import LinkClient, LinkState
from cluster.link.connection import LinkCounts, LinkOptions
from cluster.link.exchange import TOKEN_IDS
from cluster.link.frames import RequestHead, ResponseHead
from cluster.link.handshake import TlsContexts, tls_contexts
from cluster.link.local import answer_locally
from cluster.link.prefixes import PrefixEvents, PrefixSource
from cluster.link.server import DrainResult, LinkServer
from cluster.link.stream import Chunk, Stream

__all__ = [
    "TOKEN_IDS",
    "Chunk",
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
    "Stream",
    "TlsContexts",
    "answer_locally",
    "certificate_expiry",
    "tls_contexts",
]
