"""Loaded LoRA adapters, with LRU eviction."""

from collections.abc import Iterable


class AdapterSlots:
    """Slots for loaded adapters; an adapter in use is not evicted.

    Args:
        max_loras: Number of slots.
        adapters: Adapters loaded at the start; the last ones if there are too many.
    """

    def __init__(self, max_loras: int, adapters: Iterable[str] = ()) -> None:
        self._max_loras = max_loras
        # Requests by adapter, least recently used first.
        self._num_users = dict.fromkeys(list(adapters)[-max_loras:], 0)

    @property
    def loaded(self) -> tuple[str, ...]:
        return tuple(self._num_users)

    def can_run(self, adapter: str) -> bool:
        """Return True if a request for the adapter can run now; "" needs no slot."""
        users = self._num_users
        return (
            not adapter
            or adapter in users
            or len(users) < self._max_loras
            or not all(users.values())
        )

    def acquire(self, adapter: str) -> bool:
        """Use the adapter, which must be able to run; return True if it had to be loaded."""
        if not adapter:
            return False
        users, is_new = self._num_users, adapter not in self._num_users
        if is_new and len(users) == self._max_loras:
            del users[next(name for name, count in users.items() if not count)]
        users[adapter] = users.pop(adapter, 0) + 1
        return is_new

    def release(self, adapter: str) -> None:
        if adapter:
            self._num_users[adapter] -= 1
