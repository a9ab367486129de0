"""An environment of its own for a peer whose dependencies are not ours, made when it is wanted."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.endpoint import TargetError
from cluster.models.store import home as cache


def own_environment(name: str, packages: Sequence[str], *, leave_out: str = "") -> Path:
    """The directory of a virtual environment below the cache; installed now if it is not there.

    Args:
        name: Of the directory; it says which version is inside.
        packages: What to install, as pip names it.
        leave_out: A package that is not installed although others want it.

    Raises:
        TargetError: it cannot be installed.
    """
    place = cache() / "bench" / name
    if not (place / "bin").exists():
        print(f"bench: installing {packages[0]}", file=sys.stderr)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            _install(place, packages, leave_out)
        except BaseException as error:
            shutil.rmtree(place, ignore_errors=True)
            if isinstance(error, OSError | subprocess.CalledProcessError):
                said = getattr(error, "stderr", None) or error
                raise TargetError(f"{packages[0]} cannot be installed: {said}") from None
            raise
    return place


def _install(place: Path, packages: Sequence[str], leave_out: str) -> None:
    uv = Path(sys.executable).with_name("uv")
    _run(uv, "venv", "-q", "--clear", "--python", sys.executable, place)
    options: list[str | Path] = ["--python", place / "bin" / "python"]
    if leave_out:
        overrides = place / "overrides.txt"
        overrides.write_text(f'{leave_out}; python_version < "0"\n', encoding="utf-8")
        options += ["--overrides", overrides]
    _run(uv, "pip", "install", "-q", *options, *packages)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
