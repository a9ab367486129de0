"""Session affinity: requests of one session go to one replica while it is not overloaded.

Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018) on rendezvous
hashes: each session ranks the replicas by a hash, and all routers compute the same ranks. A replica
that joins or leaves moves only its own sessions.
"""

import hashlib

import numpy as np

from cluster.routing.fleet import Fleet
from cluster.routing.load_policies import LeastLoad
from cluster.routing.request import RequestView
from cluster.routing.table import AnyArray

MAX_OVER_MEAN = 1.25
"""Bound of a replica's requests in flight, as a multiple of the mean including the new request;
beyond it a session goes to its next replica."""
# Multipliers of SplitMix64 (Steele, Lea and Flood, 2014).
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class SessionAffinity:
    """The first replica in the session's own ranking that is not overloaded."""

    def __init__(self, seed: int = 0) -> None:
        self._without_session = LeastLoad(seed)
        self._hashes: AnyArray = np.zeros(0, np.uint64)
        self._hashes_version = -1

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        """Return the session's replica; the least loaded one if the request has no session."""
        if request.session is None:
            return self._without_session.choose(request, fleet)
        open_rows = fleet.open_rows()
        num_open = np.count_nonzero(open_rows)
        if num_open == 0:
            return None
        if fleet.version != self._hashes_version:
            hashes = [_hash(name or "") for name in fleet.ids]
            self._hashes, self._hashes_version = np.array(hashes, np.uint64), fleet.version
        in_flight = fleet.table.in_flight
        bound = np.ceil(MAX_OVER_MEAN * (float(in_flight.dot(open_rows)) + 1.0) / num_open)
        ranks = _mix(self._hashes ^ np.uint64(_hash(request.session)))
        ranks[~(open_rows & (in_flight < bound))] = 0
        return fleet.ids[int(ranks.argmax())]


def _hash(text: str) -> int:
    """Return a 64-bit hash that, unlike ``hash``, is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(numbers: AnyArray) -> AnyArray:
    """Return SplitMix64's finalizer: every bit depends on every bit; never 0."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * _MIX_1
    numbers = (numbers ^ (numbers >> np.uint64(27))) * _MIX_2
    mixed: AnyArray = (numbers ^ (numbers >> np.uint64(31))) | np.uint64(1)
    return mixed
