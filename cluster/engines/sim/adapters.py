"""Which LoRA adapters the engine has loaded: the one used longest ago makes room for another."""

from collections.abc import Iterable


class AdapterSlots:
    """At most ``max_loras``; one that a running request uses stays.

    Args:
        max_loras: How many are loaded at a time.
        adapters: Loaded at the start, the last ones where not all fit.
    """

    def __init__(self, max_loras: int, adapters: Iterable[str] = ()) -> None:
        self._max_loras = max_loras
        self._users = dict.fromkeys(list(adapters)[-max_loras:], 0)  # used longest ago first

    def fits(self, adapter: str) -> bool:
        """Whether a request for it can run now; none is needed for the model itself ("")."""
        users = self._users
        return (
            not adapter
            or adapter in users
            or len(users) < self._max_loras
            or not all(users.values())
        )

    def take(self, adapter: str) -> bool:
        """Note that a request that fits begins to run; returns whether it had to be loaded."""
        if not adapter:
            return False
        users, is_new = self._users, adapter not in self._users
        if is_new and len(users) == self._max_loras:
            del users[next(name for name, count in users.items() if not count)]
        users[adapter] = users.pop(adapter, 0) + 1
        return is_new

    def give_back(self, adapter: str) -> None:
        """Note that a request that took it runs no more."""
        if adapter:
            self._users[adapter] -= 1
