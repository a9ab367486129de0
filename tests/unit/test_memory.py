"""Huge pages: full memory of this process moves to them; what it hardly uses does not."""

import ctypes
import mmap
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import memory

MB = 1 << 20
SIZE = 16 * MB
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")

KERNEL = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])

pytestmark = pytest.mark.skipif(
    KERNEL < (6, 1) or not ENABLED.exists() or "[never]" in ENABLED.read_text(encoding="ascii"),
    reason="needs huge pages and MADV_COLLAPSE of Linux 6.1",
)


@pytest.fixture
def area() -> Iterator[mmap.mmap]:
    """Yield memory in a mapping of its own, because of its flag."""
    area = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_DONTDUMP)
    yield area
    area.close()


def sizes(area: mmap.mmap) -> dict[str, int]:
    """Return the figures of /proc/self/smaps for an area's mapping, in bytes."""
    first = ctypes.c_char.from_buffer(area)
    address = ctypes.addressof(first)
    del first  # the area cannot be closed while it is exported
    lines = iter(Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines())
    for line in lines:
        addresses = line.split()[0].split("-")
        if len(addresses) == 2 and int(addresses[0], 16) <= address < int(addresses[1], 16):
            break
    fields = [next(lines).split() for _ in range(20)]
    return {name: int(value[0]) * 1024 for name, *value in fields if value[1:] == ["kB"]}


def fill(area: mmap.mmap, size: int) -> None:
    area.seek(0)
    area.write(b"x" * size)


def test_full_memory_moves_to_huge_pages(area: mmap.mmap) -> None:
    fill(area, SIZE)
    assert memory.use_huge_pages() >= SIZE - 4 * MB
    after = sizes(area)
    assert after["AnonHugePages:"] >= SIZE - 4 * MB  # its ends may not be aligned
    assert after["Rss:"] == SIZE
    assert area[:SIZE] == b"x" * SIZE


def test_unused_memory_is_not_provided(area: mmap.mmap) -> None:
    for start in range(0, SIZE, 2 * MB):
        area[start : start + MB] = b"x" * MB
    before = sizes(area)["Rss:"]
    memory.use_huge_pages()
    assert sizes(area)["Rss:"] == before


def test_memory_that_a_fork_shares_stays_shared(area: mmap.mmap) -> None:
    fill(area, SIZE)
    before = sizes(area)["AnonHugePages:"]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            memory.use_huge_pages()
            os.write(writer, str(sizes(area)["AnonHugePages:"]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="ascii") as pipe:
        assert int(pipe.read()) == before
    os.waitpid(child, 0)


def test_an_administrator_can_turn_it_off(
    area: mmap.mmap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]\n", encoding="ascii")
    monkeypatch.setattr(memory, "_HUGE_PAGES", tmp_path)
    fill(area, SIZE)
    before = sizes(area)
    assert memory.use_huge_pages() == 0
    assert sizes(area) == before


def test_a_system_without_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_HUGE_PAGES", tmp_path)
    assert memory.use_huge_pages() == 0
