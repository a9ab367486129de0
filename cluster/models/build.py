"""Atomic builds of the default models.

A model is built in a temporary directory next to its destination, under a file lock, and renamed
into place with its manifest. Leftovers of a killed build are not used, and the next build deletes
them. How a model is made is up to the catalogue's builders.
"""

import asyncio
import dataclasses
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import BuildError, ConfigError
from cluster.models.store import (
    CATALOGUE,
    MANIFEST,
    DefaultModel,
    Facts,
    Manifest,
    Progress,
    manifest,
    models_dir,
)

POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """Default model that exists in the store."""

    name: str
    path: Path
    facts: Facts
    build_s: float
    fresh: bool
    """True if this call built it."""


def build(
    names: Sequence[str] | None = None,
    *,
    force: bool = False,
    progress: Progress = lambda message, fraction: None,
    catalogue: Mapping[str, DefaultModel] = CATALOGUE,
) -> list[BuiltModel]:
    """Build default models that are not built yet, or all with ``force``; return all requested.

    Without names, those are the models that the default configuration needs.

    Raises:
        ConfigError: a name is not in the catalogue; nothing is built.
        BuildError: a package is missing, a download fails, or the model is not accurate enough.
    """
    if names is None:
        names = [name for name, model in catalogue.items() if not model.on_request]
    wanted = list(dict.fromkeys(names))
    if unknown := [name for name in wanted if name not in catalogue]:
        known = ", ".join(catalogue)
        raise ConfigError(f"unknown models: {', '.join(map(repr, unknown))}; allowed: {known}")
    return [_build_one(catalogue[name], force, progress) for name in wanted]


def is_building(name: str) -> bool:
    """Return True while a process on this machine builds the default model ``name``."""
    try:
        handle = os.open(_lock_file(name), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


async def wait_for_builds(
    models: Iterable[str], catalogue: Mapping[str, DefaultModel] = CATALOGUE
) -> float:
    """Wait until no process builds any of ``models``; return the seconds."""
    began = time.monotonic()
    for name in models:
        if model := catalogue.get(name):
            while manifest(model) is None and is_building(name):  # noqa: ASYNC110 - a lock of other processes
                await asyncio.sleep(POLL_S)
    return time.monotonic() - began


def _build_one(model: DefaultModel, force: bool, progress: Progress) -> BuiltModel:
    def report(message: str, fraction: float | None) -> None:
        progress(f"{model.name}: {message}", fraction)

    if not force and (found := manifest(model)):
        return _built(found, fresh=False)
    models_dir().mkdir(parents=True, exist_ok=True)
    with _lock(model.name, report):
        if not force and (found := manifest(model)):  # another process built it meanwhile
            return _built(found, fresh=False)
        return _built(_build_into_place(model, report), fresh=True)


def _built(found: Manifest, *, fresh: bool) -> BuiltModel:
    path = models_dir() / found.name
    return BuiltModel(found.name, path, found.facts, found.build_s, fresh)


def _build_into_place(model: DefaultModel, report: Progress) -> Manifest:
    target = models_dir() / model.name
    prefix = f".{model.name}.tmp-"
    # Leftovers of killed builds; the lock guarantees that no build uses them.
    for left in models_dir().glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=models_dir()))
    started = time.monotonic()
    try:
        fresh = scratch / "new"
        fresh.mkdir()
        facts = model.builder(fresh, report)
        build_s = round(time.monotonic() - started, 1)
        files = sorted(path for path in fresh.rglob("*") if path.is_file())
        if not files:
            raise BuildError(f"model {model.name!r}: the recipe wrote no files")
        sizes = {str(path.relative_to(fresh)): path.stat().st_size for path in files}
        result = Manifest(model.name, model.recipe, build_s, sizes, facts)
        text = json.dumps(dataclasses.asdict(result), indent=2)
        (fresh / MANIFEST).write_text(f"{text}\n", encoding="utf-8")
        if target.exists():
            target.rename(scratch / "old")
        fresh.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report("built", 1.0)
    return result


@contextmanager
def _lock(name: str, report: Progress) -> Iterator[None]:
    # The kernel releases a flock when its process dies.
    handle = os.open(_lock_file(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another build of this model", None)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _lock_file(name: str) -> Path:
    return models_dir() / f".{name}.lock"
