"""Memory of this process: what its allocator does not use, and the size of its pages."""

import array
import ctypes
import gc
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_MADV_COLLAPSE = 25  # linux/mman.h, since Linux 6.1
_PAGEMAP_ENTRY_BYTES = 8
_PRESENT, _EXCLUSIVE = 1 << 63, 1 << 56  # bits of an entry of /proc/PID/pagemap
_MAX_ABSENT = 1 / 8
"""Share of a huge page that may be added memory.

After the start of SmolLM2's engine, 776 MB were in full pages, and 146 MB more with this share, for
which the engine took 4 MB more.
"""


def release_free_memory() -> None:
    """Collect garbage, and return free memory of the heap to the kernel.

    glibc returns only what is free at the end of a heap. A start leaves much else: the weights of a
    model before they were packed, and what imports needed.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def use_huge_pages() -> int:
    """Move memory to huge pages where it fills them; return the number of bytes.

    Leaves alone what this process shares with others since a fork, and what it hardly uses, so that
    it takes little more memory than before. Returns 0 if the kernel has no huge pages, cannot move
    memory to them (before Linux 6.1), or an administrator turned them off.
    """
    try:
        if "[never]" in (_HUGE_PAGES / "enabled").read_text(encoding="ascii"):
            return 0
        size = int((_HUGE_PAGES / "hpage_pmd_size").read_text(encoding="ascii"))
        runs = [*_full_runs(size)]
    except OSError as error:
        logger.debug("no huge pages: %s", error)
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    moved = [end - start for start, end in runs if not madvise(start, end - start, _MADV_COLLAPSE)]
    return sum(moved)


def _full_runs(size: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of whole huge pages whose memory is present and of this process alone."""
    entries_per_page = size // os.sysconf("SC_PAGE_SIZE")
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for first, end in _anonymous_ranges(size):
            pagemap.seek(first // size * entries_per_page * _PAGEMAP_ENTRY_BYTES)
            starts = range(first, end, size)
            full = (_is_full(pagemap.read(entries_per_page * _PAGEMAP_ENTRY_BYTES)) for _ in starts)
            for is_full, run in itertools.groupby(zip(full, starts, strict=True), lambda x: x[0]):
                if is_full:
                    pages = [start for _, start in run]
                    yield pages[0], pages[-1] + size


def _is_full(entries: bytes) -> bool:
    pages = array.array("Q", entries)
    present = [page for page in pages if page & _PRESENT]
    is_present = len(present) >= (1 - _MAX_ABSENT) * len(pages)
    return is_present and all(page & _EXCLUSIVE for page in present)


def _mappings() -> str:
    # Names of files may have any bytes.
    return Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")


def _anonymous_ranges(size: int) -> list[tuple[int, int]]:
    """Return the parts of writable anonymous mappings that consist of whole huge pages."""
    found = []
    for line in _mappings().splitlines():
        addresses, flags, _, _, inode, *name = line.split(maxsplit=5)
        if flags == "rw-p" and inode == "0" and not (name and name[0].startswith("[stack")):
            first, last = (int(each, 16) for each in addresses.split("-"))
            found.append((-(-first // size) * size, last // size * size))
    return [(first, end) for first, end in found if first < end]
