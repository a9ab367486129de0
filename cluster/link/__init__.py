"""The link: one TCP connection for each pair of router and replica, with many requests on it."""

from cluster.link.client import LinkClient, LinkState
from cluster.link.connection import LinkOptions
from cluster.link.exchange import TOKEN_IDS
from cluster.link.frames import LinkLoad, RequestHead, ResponseHead
from cluster.link.handshake import tls_contexts
from cluster.link.server import DrainResult, LinkServer
from cluster.link.stream import Chunk, Stream

__all__ = [
    "TOKEN_IDS",
    "Chunk",
    "DrainResult",
    "LinkClient",
    "LinkLoad",
    "LinkOptions",
    "LinkServer",
    "LinkState",
    "RequestHead",
    "ResponseHead",
    "Stream",
    "tls_contexts",
]
