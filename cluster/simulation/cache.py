"""The KV cache of one replica, in tokens: whole blocks of prompts are shared, the rest is private.

The same as the simulated engine's pool of blocks, but in the blocks of a trace, which are larger
than an engine's: private tokens are counted one by one. Tells what it stores and removes, as vLLM's
KV events do.
"""

from collections.abc import Sequence


class PrefixCache:
    """At most ``capacity_tokens``; the least recently used block that nobody holds makes room."""

    def __init__(self, capacity_tokens: int, block_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.block_tokens = block_tokens
        self.private_tokens = 0
        """Tokens of single requests, which no other can use."""
        self.stored: list[int] = []
        self.removed: list[int] = []
        """See ``changes``."""
        self._held: dict[int, int] = {}
        self._idle: dict[int, None] = {}

    @property
    def used_tokens(self) -> int:
        """Tokens that some request holds."""
        return self.private_tokens + len(self._held) * self.block_tokens

    @property
    def free_tokens(self) -> int:
        """Tokens that can be taken, cached blocks that nobody holds included."""
        return self.capacity_tokens - self.used_tokens

    def match(self, blocks: Sequence[int]) -> int:
        """How many of the leading blocks are cached: the end of a prompt goes before its start."""
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
        while len(self._idle) > most_idle:
            block = next(iter(self._idle))
            del self._idle[block]
            self.removed.append(block)

    def share(self, blocks: Sequence[int]) -> int:
        """Turn private tokens of the caller into cached blocks that it holds; returns how many.

        What another request has cached by now stays the caller's own.
        """
        turned = 0
        for block in blocks:
            if block in self._held or block in self._idle:
                break
            self._held[block] = 1
            turned += 1
        self.private_tokens -= turned * self.block_tokens
        self.stored += blocks[:turned]
        return turned

    def release(self, blocks: Sequence[int], private_tokens: int) -> None:
        """Give back what is held; blocks stay cached, the end of a prompt goes first."""
        self.private_tokens -= private_tokens
        for block in reversed(blocks):
            self._held[block] -= 1
            if not self._held[block]:
                del self._held[block]
                self._idle[block] = None

    def changes(self) -> tuple[list[int], list[int]]:
        """The blocks stored and removed since the last call, of which there must be one after each
        step: in a step nothing is stored after something was removed."""
        found = self.stored, self.removed
        if self.stored or self.removed:
            self.stored, self.removed = [], []
        return found
