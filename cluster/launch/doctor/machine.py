"""Checks of the machine: memory, shared memory, disks, GPUs, and model files."""

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
RECOMMENDED_MEMORY_BYTES = 8 * GIB  # for the default models on CPUs, as in the README
MIN_MEMORY_BYTES = 2 * GIB
RECOMMENDED_DISK_BYTES = 5 * GIB
MIN_DISK_SHARE = 0.05  # Ray's own limit: below it, a node counts as full
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def check_memory(available_bytes: int) -> Finding:
    text = f"{available_bytes / GIB:.1f} GiB available"
    advice = "Stop other programs, or reduce kv_cache_memory_bytes or replicas.max."
    if available_bytes < MIN_MEMORY_BYTES:
        return fail("memory", f"{text}; at least {MIN_MEMORY_BYTES // GIB} GiB needed", advice)
    if available_bytes < RECOMMENDED_MEMORY_BYTES:
        recommended = f"{RECOMMENDED_MEMORY_BYTES // GIB} GiB"
        return warn("memory", f"{text}; {recommended} recommended for the default models", advice)
    return ok("memory", text)


def available_memory() -> int:
    """Return the available memory of the machine or the container, in bytes."""
    available = psutil.virtual_memory().available
    try:
        limit = int(_CGROUP.read_text())
        used = int(_CGROUP.with_name("memory.current").read_text())
    except (OSError, ValueError):  # no limit ("max"), or no cgroup
        return available
    return min(available, max(0, limit - used))


def check_shared_memory(free: int, needed: int) -> Finding:
    """Check that /dev/shm has room for Ray's object store; sizes in bytes."""
    text = f"{free / GIB:.1f} GiB free in /dev/shm; the object store needs {needed / GIB:.2f} GiB"
    if free < needed:
        return warn(
            "shared memory",
            f"{text}, so Ray will keep objects on disk, which is slow",
            "Enlarge it (docker run --shm-size=1g), or reduce cluster.object_store_memory_bytes.",
        )
    return ok("shared memory", text)


def check_disk(path: Path, free: int, total: int) -> Finding:
    """Check the free space on the disk of ``path``; sizes in bytes."""
    text = f"{free / GIB:.1f} GiB free for {path}"
    advice = "Delete unneeded files, such as old Ray sessions (/tmp/ray/session_*)."
    if free < MIN_DISK_SHARE * total:
        limit = f"below {MIN_DISK_SHARE:.0%} of the disk, where Ray stops working"
        return fail("disk", f"{text}, {limit}", advice)
    if free < RECOMMENDED_DISK_BYTES:
        recommended = f"{RECOMMENDED_DISK_BYTES // GIB} GiB recommended"
        return warn("disk", f"{text}; {recommended}", advice)
    return ok("disk", text)


def check_machine(config: TandemConfig, home: Path, *, is_running: bool) -> Iterator[Finding]:
    if not is_running:
        yield check_memory(available_memory())
        shared = shutil.disk_usage("/dev/shm").free
        yield check_shared_memory(shared, int(config.cluster.object_store_memory_bytes))
    existing_home = next(path for path in (home, *home.parents) if path.exists())
    for path in {existing_home, Path(os.environ.get("RAY_TMPDIR", "/tmp"))}:
        usage = shutil.disk_usage(path)
        yield check_disk(path, usage.free, usage.total)


def check_models(config: TandemConfig) -> Iterator[Finding]:
    for model in config.model_files:
        try:
            yield ok("models", f"{model}: {resolve(model)}")
        except TandemError as error:
            advice = "Build default models with `tandem models build`; correct other paths."
            yield fail("models", str(error), advice)


def check_gpus(config: TandemConfig) -> Iterator[Finding]:
    resources = [generator.resources for generator in config.generators]
    resources += [classifier.resources for classifier in config.classifiers]
    needed = any(reserved.gpus > 0 for reserved in resources)
    if find_spec("pynvml") is None:
        text = "nvidia-ml-py is not installed"
        advice = "Run `pip install nvidia-ml-py`."
        yield warn("gpu", text, advice) if needed else ok("gpu", f"not needed; {text}")
        return
    nvml = importlib.import_module("pynvml")
    yield from check_gpus_with(nvml, _torch_cuda(), needed=needed)


def check_gpus_with(nvml: ModuleType, torch_cuda: str | None, *, needed: bool) -> Iterator[Finding]:
    """Check each GPU, and that the driver supports PyTorch's CUDA version, if it has one."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        text = f"NVIDIA driver not found ({error})"
        advice = "Install the driver, or set resources.gpus to 0."
        yield fail("gpu", text, advice) if needed else ok("gpu", f"not needed; {text}")
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
        advice = "See `nvidia-smi` and the kernel log (dmesg | grep -i xid)."
        yield fail("gpu", f"a GPU does not respond: {error}", advice)
    finally:
        nvml.nvmlShutdown()


def _check_driver(driver: str, cuda: tuple[int, int], torch_cuda: str | None) -> Finding:
    text = f"driver {driver} supports CUDA {cuda[0]}.{cuda[1]}"
    if torch_cuda is None:
        advice = "Install Tandem with the `gpu` extra."
        return warn("gpu", f"{text}; PyTorch is installed without CUDA", advice)
    text = f"{text}; PyTorch uses CUDA {torch_cuda}"
    # Within one major version, newer CUDA runs on older drivers.
    if int(torch_cuda.split(".")[0]) > cuda[0]:
        return fail("gpu", text, "Install a newer driver.")
    return ok("gpu", text)


def _torch_cuda() -> str | None:
    # Read from the file: importing torch takes seconds.
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None
