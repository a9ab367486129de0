"""A PostgreSQL server of its own in a temporary directory, without TCP."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER = "tandem"


def _executable(name: str) -> str:
    # Debian puts only some of them on the path.
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = shutil.which(name) or (str(versions[-1]) if versions else None)
    assert found is not None, "Install Debian's package postgresql."
    return found


def _owner() -> str | None:
    """Return the user that runs the server, which refuses to run as root."""
    if os.geteuid():
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@contextmanager
def running_postgres() -> Iterator[str]:
    """Start a server; yield the URL of its database, a socket in a directory."""
    owner = _owner()
    directory = Path(tempfile.mkdtemp(prefix="tandem-pg-", dir="/tmp"))  # a socket's path is short
    if owner is not None:
        shutil.chown(directory, owner)
    directory.chmod(0o755)
    data, log = directory / "data", directory / "log"

    def run(*command: str | Path) -> None:
        done = subprocess.run(
            command, user=owner, cwd=directory, capture_output=True, text=True, timeout=120
        )
        output = log.read_text() if log.exists() else ""
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{output}"

    try:
        initdb = "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C", "-U", USER
        run(_executable("initdb"), "-D", data, *initdb)
        options = f"-c listen_addresses='' -c fsync=off -k {directory} -c shared_buffers=16MB"
        control = _executable("pg_ctl")
        run(control, "start", "-w", "-D", data, "-l", log, "-o", options)
        try:
            yield f"postgresql://{USER}@/postgres?host={directory}"
        finally:
            run(control, "stop", "-w", "-m", "immediate", "-D", data)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
