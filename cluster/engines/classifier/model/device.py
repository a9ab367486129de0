"""Device, precision and threads that a model computes with."""

import logging
import os

import torch

from cluster.config import ClassifierConfig
from cluster.cpu import has_native_bfloat16

log = logging.getLogger(__name__)


def choose_device(config: ClassifierConfig) -> torch.device:
    if config.resources.gpus > 0:
        if torch.cuda.is_available():
            return torch.device("cuda")
        log.warning("%s reserves GPUs, but torch finds none; running on the CPU", config.name)
    return torch.device("cpu")


def choose_precision(config: ClassifierConfig, device: torch.device) -> str:
    if config.dtype != "auto":
        return config.dtype
    native = device.type == "cuda" or has_native_bfloat16()
    return "bfloat16" if native else "float32"


def num_threads(config: ClassifierConfig) -> int:
    return config.threads or len(os.sched_getaffinity(0))


def share_threads(num_threads: int, num_streams: int) -> list[int]:
    share, remainder = divmod(num_threads, num_streams)
    return [share + (index < remainder) for index in range(num_streams)]


def pin_threads() -> None:
    """Pin the calling thread to the first core and its OpenMP team to the others.

    Linux sometimes wakes two threads of a team on one core and takes tens of milliseconds to
    separate them, while one spins waiting for the other. Call this before the thread computes
    anything, and only if it uses either all cores or one: threads added to the team later would
    inherit the first core. Without effect on one core, or if a sandbox forbids it.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1:
        return
    torch.set_num_threads(len(cores))
    try:
        os.sched_setaffinity(0, cores[1:])
        torch.ones(len(cores) << 16).sum()  # starts the team, which inherits these cores
        os.sched_setaffinity(0, cores[:1])
    except OSError as error:
        log.warning("cannot pin compute threads to cores: %s", error)
