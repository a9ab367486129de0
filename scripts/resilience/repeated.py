"""A function that is called again and again in a thread."""

import threading
from collections.abc import Callable
from typing import Self


class Repeated:
    """Context manager that calls a function after each pause, from its entry to its exit."""

    def __init__(self, pause_s: float, call: Callable[[], None]) -> None:
        self._pause_s = pause_s
        self._call = call
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._pause_s):
            self._call()
