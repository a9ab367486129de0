"""KV cache of the simulated engine: blocks shared by content, with LRU eviction. Pure.

Only counts and content hashes are kept. A block's hash covers all tokens up to its end, so a
request that holds a block also holds the ones before it, and blocks are evicted from the end.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence


def block_hashes(
    tokens: Sequence[int], block_tokens: int, known: Sequence[int] = (), root: int = 0
) -> list[int]:
    """Return one hash per full block of ``tokens``.

    Args:
        tokens: Tokens of one prompt and its completion.
        block_tokens: Tokens per block.
        known: Hashes of the first blocks, if known.
        root: Distinguishes blocks with equal tokens, such as those of adapters.
    """
    hashes = list(known)
    parent = hashes[-1] if hashes else root
    start = len(hashes) * block_tokens
    for end in range(start + block_tokens, len(tokens) + 1, block_tokens):
        parent = hash((parent, *tokens[end - block_tokens : end]))
        hashes.append(parent)
    return hashes


class BlockPool:
    """Blocks that are held (in use), idle (cached, not in use) or private to one request.

    ``on_evicted`` is called with blocks that are no longer cached.
    """

    def __init__(
        self,
        capacity_tokens: int,
        block_tokens: int,
        on_evicted: Callable[[list[int]], object] | None = None,
    ) -> None:
        self.capacity_tokens = capacity_tokens
        self.block_tokens = block_tokens
        self.private_tokens = 0
        """Tokens private to single requests."""
        self._on_evicted = on_evicted
        self._held: dict[int, int] = {}  # number of requests by block
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def used_tokens(self) -> int:
        return self.private_tokens + len(self._held) * self.block_tokens

    @property
    def idle_tokens(self) -> int:
        return len(self._idle) * self.block_tokens

    @property
    def free_tokens(self) -> int:
        """Tokens that can be acquired, idle blocks included."""
        return self.capacity_tokens - self.used_tokens

    def count_cached(self, blocks: Sequence[int]) -> int:
        """Return the number of leading blocks that are cached."""
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            if blocks[middle] in self._held or blocks[middle] in self._idle:
                low = middle + 1
            else:
                high = middle
        return low

    def acquire(self, blocks: Sequence[int], private_tokens: int) -> bool:
        """Hold cached ``blocks`` and private tokens; return False and change nothing if full."""
        revived = [block for block in blocks if block in self._idle]
        if len(revived) * self.block_tokens + private_tokens > self.free_tokens:
            return False
        for block in revived:
            del self._idle[block]
        for block in blocks:
            self._held[block] = self._held.get(block, 0) + 1
        self.add_private(private_tokens)
        return True

    def add_private(self, tokens: int) -> None:
        """Add private tokens, evicting idle blocks; the tokens must be free."""
        self.private_tokens += tokens
        max_idle = self.free_tokens // self.block_tokens
        evicted = []
        while len(self._idle) > max_idle:
            evicted.append(self._idle.popitem(last=False)[0])
        if evicted and self._on_evicted is not None:
            self._on_evicted(evicted)

    def share(self, blocks: Sequence[int]) -> int:
        """Turn private tokens of the caller into cached blocks that it holds.

        Returns the number of blocks that were not cached before, which are the last ones. The
        caller's copies of the others are dropped.
        """
        fresh = 0
        for block in blocks:
            if block in self._held:
                self._held[block] += 1
                continue
            if block in self._idle:
                del self._idle[block]
            else:
                fresh += 1
            self._held[block] = 1
        self.private_tokens -= len(blocks) * self.block_tokens
        return fresh

    def release(self, blocks: Sequence[int], private_tokens: int) -> None:
        """Release blocks and private tokens; blocks stay cached, ends of prompts go first."""
        self.private_tokens -= private_tokens
        for block in reversed(blocks):
            self._held[block] -= 1
            if not self._held[block]:
                del self._held[block]
                self._idle[block] = None
