"""Where a model computes and in which numbers; reads the machine once, at the engine's start."""

import logging
import os

import torch

from cluster.config import ClassifierConfig
from cluster.engines.cpu import has_native_bfloat16

log = logging.getLogger(__name__)


def choose_device(config: ClassifierConfig) -> torch.device:
    """CUDA if the configuration reserves GPUs and torch sees one, else the processor."""
    if config.resources.gpus > 0:
        if torch.cuda.is_available():
            return torch.device("cuda")
        log.warning("%s reserves GPUs, but torch sees none: it runs on the CPU", config.name)
    return torch.device("cpu")


def choose_precision(config: ClassifierConfig, device: torch.device) -> str:
    """The configured one; ``auto`` is bfloat16 where the device computes in it, else float32."""
    if config.dtype != "auto":
        return config.dtype
    native = device.type == "cuda" or has_native_bfloat16()
    return "bfloat16" if native else "float32"


def num_threads(config: ClassifierConfig) -> int:
    """Compute threads: the configured number, or one for each core this process may use."""
    return config.threads or len(os.sched_getaffinity(0))
