"""Requests of one session go to one replica, while that one has no more than its share.

Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, 2018) on rendezvous hashes:
each session ranks the replicas by chance, every router ranks them alike, and a replica that comes
or goes moves only the sessions that are its own.
"""

import hashlib

import numpy as np

from cluster.routing.arrays import AnyArray
from cluster.routing.fleet import Fleet
from cluster.routing.load import LeastLoad
from cluster.routing.request import RequestView

MAX_OVER_MEAN = 1.25
"""Ongoing requests of a replica, over the mean with one more, at which a session goes elsewhere."""
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


class SessionAffinity:
    """The first replica of the session's own order that is not overloaded."""

    def __init__(self, seed: int = 0) -> None:
        self._others = LeastLoad(seed)
        self._hashes: AnyArray = np.zeros(0, np.uint64)
        self._version = -1

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        """The session's replica; the least loaded one for a request without a session."""
        if request.session is None:
            return self._others.choose(request, fleet)
        free = fleet.open()
        num_free = np.count_nonzero(free)
        if num_free == 0:
            return None
        if fleet.version != self._version:
            hashes = [_hash(name or "") for name in fleet.ids]
            self._hashes, self._version = np.array(hashes, np.uint64), fleet.version
        ongoing = fleet.slots.ongoing
        most = np.ceil(MAX_OVER_MEAN * (float(ongoing.dot(free)) + 1.0) / num_free)
        ranks = _mixed(self._hashes ^ np.uint64(_hash(request.session)))
        ranks[~(free & (ongoing < most))] = 0
        return fleet.ids[int(ranks.argmax())]


def _hash(text: str) -> int:
    """The same in every process, unlike ``hash``."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mixed(numbers: AnyArray) -> AnyArray:
    """The finalizer of SplitMix64: every bit depends on every bit."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * _MIX
    numbers = (numbers ^ (numbers >> np.uint64(27))) * _MIX2
    mixed: AnyArray = (numbers ^ (numbers >> np.uint64(31))) | np.uint64(1)
    return mixed
