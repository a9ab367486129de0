"""Stores of batches for several routers, in SQLite or PostgreSQL."""

from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from cluster.batches import BatchStore, open_store


@dataclass
class Place:
    """A database; each router that opens it has a directory of its own, unless that is shared."""

    directory: Path
    url: str
    """URL of PostgreSQL; empty for SQLite."""
    name: str = field(default_factory=lambda: uuid4().hex)
    opened: list[BatchStore] = field(default_factory=list)

    def next_directory(self) -> Path:
        return self.directory / uuid4().hex if self.url else self.directory

    def open(self) -> BatchStore:
        self.opened.append(open_store(self.next_directory(), self.url or None, self.name))
        return self.opened[-1]

    def close(self) -> None:
        for store in self.opened:
            store.close()
