"""Memory of this process that its allocator holds but does not use."""

import ctypes
import gc


def release_free_memory() -> None:
    """Collect garbage, and return free memory of the heap to the kernel.

    glibc returns only what is free at the end of a heap. A start leaves much else: the weights of a
    model before they were packed, and what imports needed.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
