"""Load of an engine, from the engine over the link to routing, admission and the dashboard."""

import msgspec


class Load(msgspec.Struct, frozen=True, array_like=True):
    """Load of one replica at one moment; also the payload of the link's LOAD frame."""

    running: int = 0
    """Requests in the engine's current batch."""
    waiting: int = 0
    """Requests that the engine accepted and has not started."""
    kv_cache_usage: float = 0.0
    """Share of KV blocks in use, 0 to 1."""
    in_flight: int = 0
    """Streams open on the replica, from all routers; the link server fills it in."""
    slots: int = 0
    """Requests that can run at the same time; 0 if unknown."""
