"""``vllm-router``, vLLM's own router in Rust, in front of the bare uvicorn process.

Its dependencies are not ours, so it has an environment of its own below the cache directory,
made when it is first wanted.
"""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.endpoint import Endpoint, TargetError
from benchmarks.targets.bare import spawn_bare
from benchmarks.targets.home import free_ports, new_home
from benchmarks.targets.running import MODEL, Running
from cluster.models.store import home as cache

PACKAGE = "vllm-router==0.1.17"
READY_S = 60.0


@contextlib.contextmanager
def vllm_router(decode_s: float) -> Iterator[Running]:
    """The router with one worker."""
    binary = installed()
    with new_home("router") as home:
        worker = spawn_bare(home, decode_s)
        port, metrics = free_ports(2)
        home.spawn(
            binary,
            *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)),
            *("--worker-urls", worker.url),
            *("--policy", "round_robin", "--log-level", "warning"),
        )
        endpoint = Endpoint(port, MODEL)
        home.wait_ready(endpoint, READY_S)
        yield Running(endpoint, home)


def installed() -> Path:
    """The router's program, installed now if it is not there yet."""
    place = cache() / "bench" / PACKAGE.replace("==", "-")
    binary = place / "bin" / "vllm-router"
    if not binary.exists():
        print(f"bench: installing {PACKAGE}", file=sys.stderr)
        place.parent.mkdir(parents=True, exist_ok=True)
        _install(place)
    return binary


def _install(place: Path) -> None:
    uv = Path(sys.executable).with_name("uv")
    commands: list[list[str | Path]] = [
        [uv, "venv", "-q", "--clear", "--python", sys.executable, place],
        [uv, "pip", "install", "-q", "--python", place / "bin" / "python", PACKAGE],
    ]
    try:
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, text=True)
    except BaseException as error:
        shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, OSError | subprocess.CalledProcessError):
            said = getattr(error, "stderr", None) or error
            raise TargetError(f"{PACKAGE} cannot be installed: {said}") from None
        raise
