"""The KV cache as counts of blocks: prefixes shared by content, least recently used evicted.

Owns the state of all blocks. Each is free, idle (full, cached, used by nobody), shared (full,
cached, used by some requests) or private (of one request). Knows nothing of requests or time.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence


def block_hashes(tokens: Sequence[int], block_size: int) -> list[int]:
    """One number for each full block of ``tokens``; it stands for all tokens up to its end."""
    hashes: list[int] = []
    parent = 0
    for end in range(block_size, len(tokens) + 1, block_size):
        parent = hash((parent, *tokens[end - block_size : end]))
        hashes.append(parent)
    return hashes


class BlockPool:
    """``num_blocks`` KV blocks; ``on_evicted`` is called with each that is cached no more."""

    def __init__(
        self, num_blocks: int, on_evicted: Callable[[list[int]], object] | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self._on_evicted = on_evicted
        self._private = 0
        self._shared: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def used(self) -> int:
        """Blocks that some request holds."""
        return self._private + len(self._shared)

    @property
    def available(self) -> int:
        """Blocks that can be taken, cached ones that nobody uses included."""
        return self.num_blocks - self.used

    def cached_prefix(self, hashes: Sequence[int]) -> int:
        """How many of the leading ``hashes`` are cached."""
        for count, key in enumerate(hashes):
            if key not in self._shared and key not in self._idle:
                return count
        return len(hashes)

    def take(self, hashes: Sequence[int], num_private: int) -> bool:
        """Hold the cached blocks ``hashes`` and ``num_private`` new ones, if there are enough.

        Returns False, and changes nothing, where there are not. All ``hashes`` must be cached.
        """
        from_idle = sum(key in self._idle for key in hashes)
        if from_idle + num_private > self.available:
            return False
        for key in hashes:
            self._idle.pop(key, None)
            self._shared[key] = self._shared.get(key, 0) + 1
        self._take_private(num_private)
        return True

    def share(self, hashes: Sequence[int]) -> int:
        """Turn private blocks of the caller into cached ones that it holds; returns how many.

        One that another request has cached by now keeps counting as the caller's private block.
        """
        turned = 0
        for key in hashes:
            if key in self._shared or key in self._idle:
                break
            self._shared[key] = 1
            turned += 1
        self._private -= turned
        return turned

    def release(self, hashes: Sequence[int], num_private: int) -> None:
        """Give back held blocks; the cached ones stay cached, the end of a prefix goes first."""
        self._private -= num_private
        for key in reversed(hashes):
            self._shared[key] -= 1
            if not self._shared[key]:
                del self._shared[key]
                self._idle[key] = None

    def _take_private(self, count: int) -> None:
        self._private += count
        evicted = []
        while self.used + len(self._idle) > self.num_blocks:
            evicted.append(self._idle.popitem(last=False)[0])
        if evicted and self._on_evicted is not None:
            self._on_evicted(evicted)
