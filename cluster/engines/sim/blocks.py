"""The KV cache as counts of tokens: blocks shared by content, the least recently used evicted.

Owns the state of all blocks: held (cached, used by some requests), idle (cached, used by nobody),
or private tokens of one request. A block's number stands for all tokens up to its end, so whoever
holds one holds those before it, and they are evicted after it. Knows nothing of requests or time.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence


def block_hashes(
    tokens: Sequence[int], block_tokens: int, known: Sequence[int] = (), root: int = 0
) -> list[int]:
    """One number for each full block of ``tokens``.

    Args:
        tokens: Of one prompt and its answer.
        block_tokens: Of each block.
        known: The numbers of the first blocks.
        root: What other blocks of the same tokens are told apart by.
    """
    hashes = list(known)
    parent = hashes[-1] if hashes else root
    start = len(hashes) * block_tokens
    for end in range(start + block_tokens, len(tokens) + 1, block_tokens):
        parent = hash((parent, *tokens[end - block_tokens : end]))
        hashes.append(parent)
    return hashes


class BlockPool:
    """At most ``capacity_tokens``; ``on_evicted`` is called with blocks that are cached no more."""

    def __init__(
        self,
        capacity_tokens: int,
        block_tokens: int,
        on_evicted: Callable[[list[int]], object] | None = None,
    ) -> None:
        self.capacity_tokens = capacity_tokens
        self.block_tokens = block_tokens
        self.private_tokens = 0
        """Tokens of single requests, which no other can use."""
        self._on_evicted = on_evicted
        self._held: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def used_tokens(self) -> int:
        """Tokens that some request holds."""
        return self.private_tokens + len(self._held) * self.block_tokens

    @property
    def free_tokens(self) -> int:
        """Tokens that can be taken, cached blocks that nobody holds included."""
        return self.capacity_tokens - self.used_tokens

    def match(self, blocks: Sequence[int]) -> int:
        """How many of the leading blocks are cached."""
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            if blocks[middle] in self._held or blocks[middle] in self._idle:
                low = middle + 1
            else:
                high = middle
        return low

    def take(self, blocks: Sequence[int], private_tokens: int) -> bool:
        """Hold cached ``blocks`` and private tokens; False, and nothing changes: no room."""
        revived = [block for block in blocks if block in self._idle]
        if len(revived) * self.block_tokens + private_tokens > self.free_tokens:
            return False
        for block in revived:
            del self._idle[block]
        for block in blocks:
            self._held[block] = self._held.get(block, 0) + 1
        self.grow(private_tokens)
        return True

    def grow(self, tokens: int) -> None:
        """Take private tokens, of which there must be as many free."""
        self.private_tokens += tokens
        most_idle = self.free_tokens // self.block_tokens
        evicted = []
        while len(self._idle) > most_idle:
            evicted.append(self._idle.popitem(last=False)[0])
        if evicted and self._on_evicted is not None:
            self._on_evicted(evicted)

    def share(self, blocks: Sequence[int]) -> int:
        """Turn private tokens of the caller into cached blocks that it holds.

        Returns how many of them, which are the last ones, were not cached before; the caller's own
        copies of the others are given up.
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
        """Give back what is held; blocks stay cached, the end of a prompt goes first."""
        self.private_tokens -= private_tokens
        for block in reversed(blocks):
            self._held[block] -= 1
            if not self._held[block]:
                del self._held[block]
                self._idle[block] = None
