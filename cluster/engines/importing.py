"""What makes the import of an engine's code shorter."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Let Python look for no garbage meanwhile, and never among what there is in the end.

    Imports make a million objects that live as long as the process; looking through them again and
    again took a fifth of the time. One more look, for the 1 % of them that nobody needs, would cost
    a third of what this saves (see ADR 10). For code alone: a model in a cycle would stay for ever.
    So only the first engine of a process has anything frozen; a second one finds its code there,
    and beside it what the first one left.
    """
    first = not gc.get_freeze_count()
    gc.disable()
    try:
        yield
        if first:
            gc.freeze()
    finally:
        gc.enable()
