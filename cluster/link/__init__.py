"""The link: one TCP connection for each pair of router and replica, shared by many requests."""

from cluster.link.answer_store import CONFLICT, AnswerStore
from cluster.link.client import LinkClient, LinkState
from cluster.link.client_stream import ClientStream
from cluster.link.connection import LinkCounts, LinkOptions, Signal
from cluster.link.frames import (
    Adapters,
    AnswerEvents,
    AnswerKey,
    PrefixEvents,
    RequestHead,
    ResponseHead,
    Resume,
)
from cluster.link.handshake import TlsContexts, certificate_expiry, tls_contexts
from cluster.link.local import answer_locally
from cluster.link.record import AnswerRecord
from cluster.link.server import DrainResult, LinkServer, PrefixSource
from cluster.link.stored_answer import REPLAY_HEADER, REPLAYED

__all__ = [
    "CONFLICT",
    "REPLAYED",
    "REPLAY_HEADER",
    "Adapters",
    "AnswerEvents",
    "AnswerKey",
    "AnswerRecord",
    "AnswerStore",
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
    "Resume",
    "Signal",
    "TlsContexts",
    "answer_locally",
    "certificate_expiry",
    "tls_contexts",
]
