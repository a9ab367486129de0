"""Virtual environments for peers whose dependencies conflict with ours, installed on first use."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.endpoint import TargetError
from cluster.models.store import home as cache


def install_peer(name: str, packages: Sequence[str], leave_out: str = "") -> Path:
    """Return a virtual environment below the cache directory; install it if it is missing.

    Args:
        name: Directory name; includes the version of the peer.
        packages: pip requirements.
        leave_out: Dependency that is not installed even though others require it.

    Raises:
        TargetError: The installation failed.
    """
    environment = cache() / "bench" / name
    if not (environment / "bin").exists():
        print(f"bench: installing {packages[0]}", file=sys.stderr)
        environment.parent.mkdir(parents=True, exist_ok=True)
        try:
            _install(environment, packages, leave_out)
        except BaseException as error:
            shutil.rmtree(environment, ignore_errors=True)
            if isinstance(error, OSError | subprocess.CalledProcessError):
                cause = getattr(error, "stderr", None) or error
                raise TargetError(f"Cannot install {packages[0]}: {cause}") from None
            raise
    return environment


def use_our_packages(environment: Path) -> None:
    """Let a peer import this environment's packages, such as PyTorch, where it has none itself."""
    (theirs,) = (environment / "lib").glob("python*/site-packages")
    ours = Path(sys.prefix) / "lib" / theirs.parent.name / "site-packages"
    (theirs / "zz_ours.pth").write_text(f"{ours}\n", encoding="utf-8")


def _install(environment: Path, packages: Sequence[str], leave_out: str) -> None:
    uv = Path(sys.executable).with_name("uv")
    _run(uv, "venv", "-q", "--clear", "--python", sys.executable, environment)
    options: list[str | Path] = ["--python", environment / "bin" / "python"]
    if leave_out:
        overrides = environment / "overrides.txt"
        overrides.write_text(f'{leave_out}; python_version < "0"\n', encoding="utf-8")
        options += ["--overrides", overrides]
    _run(uv, "pip", "install", "-q", *options, *packages)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
