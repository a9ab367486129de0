"""Progress of one answer: the order in which its outputs are passed on, recorded and replayed."""

import random
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from cluster.asgi import Journal
from cluster.engines.vllm import journal as entries
from cluster.link import Signal


class Progress:
    """Outputs of one HTTP request: first those of an earlier replica, then new ones.

    A request can call ``generate`` several times (a list of prompts). Outputs of its calls are
    passed on one after the other, each once the application has taken the one before. So the
    journal has them in the order in which the body has them.
    """

    def __init__(self, journal: Journal) -> None:
        start, outputs = entries.decode(journal.earlier)
        if start is None:
            start = entries.Start(time.time(), secrets.randbits(63))
            journal.add(entries.encode_start(start))
        self.time_s = start.time_s
        """Unix time at which the answer began, in seconds."""
        self._random = random.Random(start.seed)
        self._journal = journal
        self._earlier = deque(outputs)
        self._num_earlier = Counter(output.call for output in outputs)  # by call
        self._num_calls = 0
        self._is_busy = False  # an output was passed on and not taken yet
        self._changed = Signal()

    def next_call(self) -> int:
        """Return the number of a new call of ``generate``."""
        self._num_calls += 1
        return self._num_calls - 1

    def random_uuid(self) -> str:
        """Return vLLM's ``random_uuid``, the same in every replica that gives this answer."""
        return f"{self._random.getrandbits(64):016x}"

    def has_earlier(self, call: int) -> bool:
        """Return True if outputs of this call are left that an earlier replica passed on."""
        return self._num_earlier[call] > 0

    async def replay(self, call: int) -> entries.Output:
        """Wait for the turn of a call's next earlier output and return it."""
        while self._is_busy or self._earlier[0].call != call:
            await self._changed.wait()
        self._is_busy = True
        self._num_earlier[call] -= 1
        return self._earlier.popleft()

    def end_turn(self) -> None:
        """Let the next output pass: the application has taken this one."""
        self._is_busy = False
        self._changed.fire()

    async def record(
        self, call: int, outputs: AsyncGenerator[Any, None], *, is_new: bool
    ) -> AsyncIterator[Any]:
        """Yield the new outputs of a call, each recorded; ``is_new`` if it had none before."""
        is_first, add = is_new, self._journal.add
        async for output in outputs:
            alone = self._num_calls == 1 and not self._earlier
            if not alone:
                while self._is_busy or self._earlier:
                    await self._changed.wait()
                self._is_busy = True
            add(entries.encode_output(call, output, is_first=is_first))
            is_first = False
            try:
                yield output
            finally:
                if not alone:
                    self.end_turn()
