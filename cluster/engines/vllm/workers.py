"""Workers of vLLM in other actors: their processes and GPUs, which belong to the replica."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from cluster.engines.base import EngineWorker

DESCRIBE_WORKER = "tandem_describe_worker"
"""Name of ``describe_worker`` in vLLM's worker class."""
DESCRIBE_TIMEOUT_S = 30.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def describe_worker(_worker: Any) -> dict[str, str | int]:
    """Return pid, GPU and process namespace of the worker that runs this."""
    return {"pid": os.getpid(), "device": _own_device(), "namespace": process_namespace()}


def process_namespace() -> str:
    """Return a name that processes share exactly if their pids mean the same."""
    return f"{_BOOT_ID.read_text('ascii').strip()} {os.readlink('/proc/self/ns/pid')}"


async def find_workers(llm: Any, num_workers: int) -> list[EngineWorker]:
    """Return an engine's workers on this node that are not descendants of this process."""
    if num_workers == 1:
        return []
    described = await llm.collective_rpc(DESCRIBE_WORKER, timeout=DESCRIBE_TIMEOUT_S)
    return await asyncio.to_thread(_workers_here, described)


def _workers_here(descriptions: Sequence[Mapping[str, Any]]) -> list[EngineWorker]:
    here = process_namespace()
    descendants = {child.pid for child in psutil.Process().children(recursive=True)}
    return [
        EngineWorker(worker["pid"], worker["device"])
        for worker in descriptions
        if worker["namespace"] == here and worker["pid"] not in descendants
    ]


def _own_device() -> str:
    """Return the UUID of the current GPU in NVML's spelling; empty without CUDA."""
    import torch

    if not torch.cuda.is_available():
        return ""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
