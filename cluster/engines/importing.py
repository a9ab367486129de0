"""What makes the import of an engine's code shorter."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Let Python look for no garbage meanwhile, and never among what there is in the end.

    Imports make a million objects that live as long as the process; looking through them again and
    again took a fifth of the time. For code alone: a model in a cycle would stay for ever.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
