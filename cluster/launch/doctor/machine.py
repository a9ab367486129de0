"""The machine: memory, shared memory, disks, GPUs, and the models on the disks."""

import importlib
import os
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import psutil

from cluster.config import TandemConfig
from cluster.errors import TandemError
from cluster.launch.doctor.finding import Finding, fail, ok, warn
from cluster.models.store import resolve

GIB = 1024**3
MEMORY_BYTES = 8 * GIB
"""For the default models on CPUs; the README's figure."""
LEAST_MEMORY_BYTES = 2 * GIB
DISK_BYTES = 5 * GIB
LEAST_DISK_SHARE = 0.05
"""Ray takes a node with less free for full, and starts nothing that needs the disk."""
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def check_memory(available: int) -> Finding:
    """Whether there is memory for a cluster that is yet to be started, in bytes."""
    text = f"{available / GIB:.1f} GiB available"
    advice = "end other programs, or serve smaller models (kv_cache_memory_bytes, replicas.max)"
    if available < LEAST_MEMORY_BYTES:
        return fail("memory", text, advice)
    if available < MEMORY_BYTES:
        return warn("memory", f"{text}; the default models want {MEMORY_BYTES // GIB}", advice)
    return ok("memory", text)


def available_memory() -> int:
    """What this machine, or the container that this runs in, has left."""
    available = psutil.virtual_memory().available
    try:
        limit = int(_CGROUP.read_text())
        used = int(_CGROUP.with_name("memory.current").read_text())
    except (OSError, ValueError):  # no limit ("max"), or no cgroup
        return available
    return min(available, max(0, limit - used))


def check_shared_memory(free: int, wanted: int) -> Finding:
    """Whether /dev/shm holds Ray's object store; both in bytes."""
    text = f"{free / GIB:.1f} GiB free in /dev/shm, {wanted / GIB:.2f} wanted"
    if free < wanted:
        return warn(
            "shared memory",
            f"{text}: Ray will keep objects on the disk, which is slow",
            "enlarge it (docker run --shm-size=1g), or lower cluster.object_store_memory_bytes",
        )
    return ok("shared memory", text)


def check_disk(path: Path, free: int, total: int) -> Finding:
    """Whether the disk of ``path`` has room; both in bytes."""
    text = f"{free / GIB:.1f} GiB free for {path}"
    advice = "remove what is not needed, old Ray sessions (/tmp/ray/session_*) among it"
    if free < LEAST_DISK_SHARE * total:
        return fail("disk", f"{text}, less than {LEAST_DISK_SHARE:.0%}: Ray stops there", advice)
    if free < DISK_BYTES:
        return warn("disk", text, advice)
    return ok("disk", text)


def check_machine(config: TandemConfig, home: Path, *, runs: bool) -> Iterator[Finding]:
    """Everything of the machine; ``runs``: the cluster does, and has its memory already."""
    if not runs:
        yield check_memory(available_memory())
        shared = shutil.disk_usage("/dev/shm").free
        yield check_shared_memory(shared, int(config.cluster.object_store_memory_bytes))
    for path in {_existing(home), Path(os.environ.get("RAY_TMPDIR", "/tmp"))}:
        usage = shutil.disk_usage(path)
        yield check_disk(path, usage.free, usage.total)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def check_models(config: TandemConfig) -> Iterator[Finding]:
    """Whether the files of each configured model are there."""
    for model in config.model_files:
        try:
            yield ok("models", f"{model}: {resolve(model)}")
        except TandemError as error:
            advice = "`tandem models build` makes the default ones; else correct its path"
            yield fail("models", str(error), advice)


def check_gpus(config: TandemConfig) -> Iterator[Finding]:
    """The GPUs that the configuration reserves, beside those that NVIDIA's library knows."""
    resources = [generator.resources for generator in config.generators]
    resources += [classifier.resources for classifier in config.classifiers]
    wanted = any(reserved.gpus > 0 for reserved in resources)
    if find_spec("pynvml") is None:
        text = "nvidia-ml-py is not installed"
        advice = "pip install nvidia-ml-py"
        yield warn("gpu", text, advice) if wanted else ok("gpu", f"none wanted; {text}")
        return
    yield from look_at_gpus(importlib.import_module("pynvml"), _torch_cuda(), wanted=wanted)


def look_at_gpus(nvml: ModuleType, torch_cuda: str | None, *, wanted: bool) -> Iterator[Finding]:
    """Each GPU, and whether the driver is as new as PyTorch's CUDA.

    Args:
        nvml: The module ``pynvml``.
        torch_cuda: Of which CUDA the installed PyTorch is; None: of none.
        wanted: Whether the configuration reserves GPUs.
    """
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        text = f"no NVIDIA driver answers ({error})"
        advice = "install the driver, or set resources.gpus to 0"
        yield fail("gpu", text, advice) if wanted else ok("gpu", f"none wanted; {text}")
        return
    try:
        cuda = nvml.nvmlSystemGetCudaDriverVersion()
        yield _check_driver(nvml.nvmlSystemGetDriverVersion(), (cuda // 1000, cuda % 1000 // 10),
                            torch_cuda)  # fmt: skip
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            text = f"{index}: {nvml.nvmlDeviceGetName(handle)}, "
            text += f"{memory.free / GIB:.0f} of {memory.total / GIB:.0f} GiB free"
            yield ok("gpu", text)
    except nvml.NVMLError as error:
        advice = "see `nvidia-smi` and the kernel's log (dmesg | grep -i xid)"
        yield fail("gpu", f"a GPU does not answer: {error}", advice)
    finally:
        nvml.nvmlShutdown()


def _check_driver(driver: str, cuda: tuple[int, int], torch_cuda: str | None) -> Finding:
    text = f"driver {driver}, for CUDA up to {cuda[0]}.{cuda[1]}"
    if torch_cuda is None:
        return warn("gpu", f"{text}; PyTorch is installed without CUDA", "set up with a GPU's vLLM")
    # Within one major version, newer CUDA runs on older drivers.
    if int(torch_cuda.split(".")[0]) > cuda[0]:
        return fail("gpu", f"{text}; PyTorch is of CUDA {torch_cuda}", "install a newer driver")
    return ok("gpu", f"{text}; PyTorch is of CUDA {torch_cuda}")


def _torch_cuda() -> str | None:
    """Of which CUDA PyTorch is; read from its file, for importing it takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None
