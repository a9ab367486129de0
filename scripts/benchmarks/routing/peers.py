"""Routing policies of other routers, reimplemented from their documentation and source.

They implement our interface, so that one simulator runs all policies. Prompts are chains of block
hashes instead of text, which is equivalent to a tree of text cut at the same positions. Only the
choices are comparable, not the time that a choice takes.
"""

import random
from collections.abc import Iterable

from cluster.routing import Fleet, RequestView


class RayPowerOfTwo:
    """Ray Serve's ``PowerOfTwoChoicesRequestRouter``.

    It draws two of all replicas, full ones included, and takes the one with the shorter queue of
    those that accept. If neither accepts, it draws again (Ray does so after 25 ms or more).

    Source: Ray 2.60, ``serve/_private/request_router/pow_2_router.py`` and ``request_router.py``.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        """Return the less busy one of two random replicas; None after too many full pairs."""
        rows = [row for row, name in enumerate(fleet.ids) if name is not None]
        for _ in rows:
            pair = self._random.sample(rows, min(2, len(rows)))
            if (row := _shortest_queue(pair, fleet)) is not None:
                return fleet.ids[row]
        return None


class RayPrefixAffinity:
    """Ray Serve LLM's ``PrefixCacheAffinityRouter`` with its defaults.

    It keeps a tree of the prompts that it routed; it does not know the engines' caches. If the
    queue lengths differ by more than ``imbalanced_threshold`` (by default they never do), it uses
    power of two. Otherwise the candidates are the replicas with the longest match, if that is at
    least a tenth of the prompt, or else the replicas with the least text; it takes the candidate
    with the shortest queue. Eviction from the tree is off by default.

    Source: Ray 2.60, ``llm/_internal/serve/routing_policies/prefix_aware``.
    """

    def __init__(
        self,
        seed: int = 0,
        imbalanced_threshold: float = float("inf"),
        match_rate_threshold: float = 0.1,
    ) -> None:
        self._tree = PromptTree()
        self._power_of_two = RayPowerOfTwo(seed)
        self._imbalanced = imbalanced_threshold
        self._match_rate = match_rate_threshold

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        """Return the least busy candidate; None if all candidates are full."""
        names = [name for name in fleet.ids if name is not None]
        queues = [fleet.in_flight(name) for name in names]
        if not names:
            return None
        if max(queues) - min(queues) > self._imbalanced:
            chosen = self._power_of_two.choose(request, fleet)
        else:
            rate, owners = self._tree.match(request, names)
            if rate < self._match_rate:
                owners = self._tree.smallest(names)
            row = _shortest_queue([fleet.row_of(name) for name in owners], fleet)
            chosen = None if row is None else fleet.ids[row]
        if chosen is not None:
            self._tree.insert(request, chosen)
        return chosen


class VllmRouterCacheAware:
    """``vllm-router --policy cache_aware`` with the defaults of its command line.

    Load is imbalanced if the busiest worker has over ``abs_threshold`` requests more than the least
    busy one and over ``rel_threshold`` times as many; it then takes the least busy worker.
    Otherwise it takes a worker with the longest match in its tree of routed prompts, if that is
    more than ``cache_threshold`` of the prompt, or else the least busy worker (the documentation
    says: the one with the smallest tree). The tree's limit of 2^25 characters per worker is left
    out because it is far above the size of a KV cache.

    Source: vllm-router 0.1.17's ``router_args.py`` for the defaults; the project's
    ``docs/load_balancing`` and ``src/policies/cache_aware.rs`` for the behaviour.
    """

    def __init__(
        self,
        cache_threshold: float = 0.3,
        abs_threshold: int = 64,
        rel_threshold: float = 1.5,
    ) -> None:
        self._tree = PromptTree()
        self._cache_threshold = cache_threshold
        self._abs_threshold = abs_threshold
        self._rel_threshold = rel_threshold

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        """Return the matching or the least busy worker; None if it is full.

        The router itself knows no capacity.
        """
        names = [name for name in fleet.ids if name is not None]
        if not names:
            return None
        queues = {name: fleet.in_flight(name) for name in names}
        most, least = max(queues.values()), min(queues.values())
        chosen = min(names, key=queues.__getitem__)
        if most - least <= self._abs_threshold or most <= least * self._rel_threshold:
            rate, owners = self._tree.match(request, names)
            if rate > self._cache_threshold:
                chosen = owners[0]
        if not fleet.open_rows()[fleet.row_of(chosen)]:
            return None
        self._tree.insert(request, chosen)
        return chosen


class PromptTree:
    """Prompts routed to each replica, and the number of their tokens."""

    def __init__(self) -> None:
        self._owners: dict[int, dict[str, None]] = {}
        self._tokens: dict[str, float] = {}

    def insert(self, request: RequestView, name: str) -> None:
        """Record that a prompt was routed to a replica."""
        before, sum_tokens = 0.0, self._tokens.get(name, 0.0)
        for prefix, end in zip(request.prefix, request.prefix_tokens, strict=True):
            owners = self._owners.setdefault(prefix, {})
            if name not in owners:
                owners[name] = None
                sum_tokens += end - before
            before = end
        self._tokens[name] = sum_tokens

    def match(self, request: RequestView, names: list[str]) -> tuple[float, list[str]]:
        """Return the longest matched share of a prompt and its owners among ``names``.

        If nothing matches, all of ``names`` are owners.
        """
        owners, matched = names, 0.0
        for prefix, end in zip(request.prefix, request.prefix_tokens, strict=True):
            held = self._owners.get(prefix, {})
            if not (deeper := [name for name in names if name in held]):
                break
            owners, matched = deeper, end
        return matched / max(1.0, request.prompt_tokens), owners

    def smallest(self, names: list[str]) -> list[str]:
        """Return the replicas with the least text."""
        least = min(self._tokens.get(name, 0.0) for name in names)
        return [name for name in names if self._tokens.get(name, 0.0) == least]


def _shortest_queue(rows: Iterable[int], fleet: Fleet) -> int | None:
    """Return the least busy row among those that accept requests."""
    is_open, in_flight = fleet.open_rows(), fleet.table.in_flight
    return min((row for row in rows if is_open[row]), key=in_flight.__getitem__, default=None)
