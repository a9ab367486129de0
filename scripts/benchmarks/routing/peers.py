"""Other routers' policies, written anew from what they are documented or seen to do.

They have our interface, so that one simulator runs all. Prompts are chains of hashes here instead
of text; a tree of text that is cut at the same places holds the same. Nothing is said of the time
that they take.
"""

import random
from collections.abc import Callable, Iterable

import numpy as np

from cluster.routing import Fleet, RequestView


class RayPowerOfTwo:
    """Ray Serve's ``PowerOfTwoChoicesRequestRouter``.

    Two replicas are drawn from all, whether they have room or not; of those that accept, the one
    with the shorter queue is taken. Where neither does, it draws again (Ray after 25 ms and more).

    Source: Ray 2.60, ``serve/_private/request_router/pow_2_router.py`` and ``request_router.py``.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        """The less busy one of two that are drawn; None where none had room for long."""
        slots = [slot for slot, name in enumerate(fleet.ids) if name is not None]
        for _ in slots:
            pair = self._random.sample(slots, min(2, len(slots)))
            if (slot := _shortest_queue(pair, fleet)) is not None:
                return fleet.ids[slot]
        return None


class RayPrefixAffinity:
    """Ray Serve LLM's ``PrefixCacheAffinityRouter`` with its defaults.

    A tree of the prompts that were routed, never of what an engine keeps. As long as the longest
    and the shortest queue are not further apart than ``imbalanced_threshold`` (by default never),
    the replicas that own the deepest match of at least a tenth of the prompt are candidates, else
    those that own the least text; among candidates the shortest queue is taken. Where load is
    imbalanced it is power of two. The tree is not evicted from unless that is switched on.

    Source: Ray 2.60, ``llm/_internal/serve/routing_policies/prefix_aware``.
    """

    def __init__(
        self,
        seed: int = 0,
        imbalanced_threshold: float = float("inf"),
        match_rate_threshold: float = 0.1,
    ) -> None:
        self._tree = PromptTree()
        self._otherwise = RayPowerOfTwo(seed)
        self._imbalanced = imbalanced_threshold
        self._match_rate = match_rate_threshold

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        """The least busy candidate; None where it has no room."""
        names = [name for name in fleet.ids if name is not None]
        queues = [fleet.in_flight(name) for name in names]
        if not names:
            return None
        if max(queues) - min(queues) > self._imbalanced:
            chosen = self._otherwise.choose(request, fleet)
        else:
            rate, owners = self._tree.match(request, names)
            if rate < self._match_rate:
                owners = self._tree.smallest(names)
            slot = _shortest_queue([fleet.row_of(name) for name in owners], fleet)
            chosen = None if slot is None else fleet.ids[slot]
        if chosen is not None:
            self._tree.insert(request, chosen)
        return chosen


class VllmRouterCacheAware:
    """``vllm-router --policy cache_aware`` with its command line's defaults.

    Load is imbalanced where the busiest worker has more than ``abs_threshold`` requests more than
    the idlest and more than ``rel_threshold`` times as many: then the least busy one is taken. Else
    one owner of the deepest match in a tree of the prompts that were routed is taken where that is
    more than ``cache_threshold`` of the prompt, and the least busy worker where it is not (its
    documents say: the one with the smallest tree). The tree's bound, 2^25 characters for each
    worker, is left out: it is far above what a KV cache holds.

    Source: vllm-router 0.1.17's ``router_args.py`` for the defaults; the project's
    ``docs/load_balancing`` and ``src/policies/cache_aware.rs`` for what it does.
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
        """The matching or the least busy worker; it knows no capacity, so None if that is full."""
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


class Oracle:
    """Knows what is cached: takes a replica with room that has most of the prompt, always.

    What it hits is the most that any choice could, request by request; what that does to load is
    not its concern.

    Args:
        cached_tokens: Prompt tokens that a replica has or is computing at this moment.
    """

    def __init__(self, cached_tokens: Callable[[str, RequestView], float]) -> None:
        self._cached_tokens = cached_tokens

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        """The replica with most cached; the one with the least work among equals."""
        work_s = fleet.work_s()

        def order(slot: int) -> tuple[float, float]:
            return -self._cached_tokens(fleet.ids[slot] or "", request), float(work_s[slot])

        free = [int(slot) for slot in np.flatnonzero(fleet.open_rows())]
        return fleet.ids[min(free, key=order)] if free else None


class PromptTree:
    """Which prompts were routed to which replica, and how much text each has of it."""

    def __init__(self) -> None:
        self._owners: dict[int, dict[str, None]] = {}
        self._tokens: dict[str, float] = {}

    def insert(self, request: RequestView, name: str) -> None:
        """Take in that a prompt was routed there."""
        before, sum_tokens = 0.0, self._tokens.get(name, 0.0)
        for prefix, end in zip(request.prefix, request.prefix_tokens, strict=True):
            owners = self._owners.setdefault(prefix, {})
            if name not in owners:
                owners[name] = None
                sum_tokens += end - before
            before = end
        self._tokens[name] = sum_tokens

    def match(self, request: RequestView, names: list[str]) -> tuple[float, list[str]]:
        """The share of a prompt that any of ``names`` owns, and who owns that much; all: none."""
        owners, matched = names, 0.0
        for prefix, end in zip(request.prefix, request.prefix_tokens, strict=True):
            held = self._owners.get(prefix, {})
            if not (deeper := [name for name in names if name in held]):
                break
            owners, matched = deeper, end
        return matched / max(1.0, request.prompt_tokens), owners

    def smallest(self, names: list[str]) -> list[str]:
        """Those that own the least text."""
        least = min(self._tokens.get(name, 0.0) for name in names)
        return [name for name in names if self._tokens.get(name, 0.0) == least]


def _shortest_queue(slots: Iterable[int], fleet: Fleet) -> int | None:
    """The slot with the fewest ongoing requests among those with room."""
    free, ongoing = fleet.open_rows(), fleet.table.in_flight
    return min((slot for slot in slots if free[slot]), key=ongoing.__getitem__, default=None)
