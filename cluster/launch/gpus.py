"""GPUs of this machine: reservation for pools that do not mention them, and a check of room."""

import math
import os
from collections.abc import Iterator
from itertools import chain, takewhile
from pathlib import Path

from cluster.config import ClassifierConfig, GeneratorConfig, TandemConfig
from cluster.devices import load_nvml
from cluster.errors import ConfigError

CLASSIFIER_SHARE = 0.1
"""Share of a GPU for a classifier replica; BERT-like models with their buffers need 1 to 2 GB."""
DRIVER = Path("/proc/driver/nvidia/gpus")
"""Directory of the driver with an entry for each GPU, for machines without nvidia-ml-py."""
_EPSILON = 1e-6

Pool = GeneratorConfig | ClassifierConfig


def count_gpus() -> int:
    """Return the number of this machine's NVIDIA GPUs that Ray will use."""
    nvml = load_nvml()
    present = len(list(DRIVER.glob("*"))) if nvml is None else int(nvml.nvmlDeviceGetCount())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    # CUDA ignores what follows an invalid index; -1 hides all GPUs.
    listed = takewhile(lambda device: device not in ("", "-1"), map(str.strip, visible.split(",")))
    return min(present, len(list(listed)))


def gpu_settings(config: TandemConfig, num_gpus: int) -> list[str]:
    """Return the ``--set`` values that reserve the machine's GPUs.

    Pools that set ``resources.gpus`` stay as they are. A classifier gets a tenth of a GPU. A
    generator gets one per worker, or an equal share if all its replicas would not fit.
    """
    if not num_gpus:
        return []
    unset = [(path, pool) for path, pool in _pools(config) if _is_unset(pool)]
    shares = {path: _share(pool, config, num_gpus) for path, pool in unset}
    settings = [f"{path}.resources.gpus={share:g}" for path, share in shares.items()]
    # Autoscaling and updates must not wait for GPUs that the machine does not have.
    return settings if config.budget.gpus is not None else [*settings, f"budget.gpus={num_gpus}"]


def check_gpus_fit(config: TandemConfig, num_gpus: int) -> None:
    """Raise if the smallest number of replicas does not fit on the machine's GPUs.

    Raises:
        ConfigError: names the pools, their GPUs and those of the machine.
    """
    pools = [pool for pool in config.pools if pool.resources.gpus]
    workers = ([pool.resources.gpus] * pool.replicas.min * pool.num_workers for pool in pools)
    free = [1.0] * num_gpus
    for part in sorted(chain.from_iterable(workers), reverse=True):
        index = next((i for i, room in enumerate(free) if room >= part - _EPSILON), None)
        if index is None:
            wanted = ", ".join(
                f"{pool.name} {pool.replicas.min} x {pool.num_workers * pool.resources.gpus:g}"
                for pool in pools
            )
            raise ConfigError(
                f"resources.gpus: replicas.min of the pools needs more GPUs ({wanted}) than this "
                f"machine has ({num_gpus}); lower replicas.min, or share GPUs with fractions such "
                f"as `gpus: 0.5`"
            )
        free[index] -= part


def _pools(config: TandemConfig) -> Iterator[tuple[str, Pool]]:
    for index, generator in enumerate(config.generators):
        yield f"generators.{index}", generator
    for index, classifier in enumerate(config.classifiers):
        yield f"classifiers.{index}", classifier


def _is_unset(pool: Pool) -> bool:
    computes = isinstance(pool, ClassifierConfig) or pool.engine == "vllm"
    return computes and "gpus" not in pool.resources.model_fields_set


def _share(pool: Pool, config: TandemConfig, num_gpus: int) -> float:
    """Return the GPUs of one worker."""
    if isinstance(pool, ClassifierConfig):
        return CLASSIFIER_SHARE
    if pool.num_workers > 1:
        return 1.0
    unset = [other for other in config.pools if _is_unset(other)]
    reserved = sum(
        other.replicas.max * other.num_workers * other.resources.gpus
        for other in config.pools
        if not _is_unset(other)
    )
    classifiers = sum(o.replicas.max for o in unset if isinstance(o, ClassifierConfig))
    generators = sum(
        other.replicas.max * other.num_workers
        for other in unset
        if isinstance(other, GeneratorConfig)
    )
    free = num_gpus - math.ceil(reserved - _EPSILON)
    if generators + math.ceil(classifiers * CLASSIFIER_SHARE - _EPSILON) <= free:
        return 1.0
    cards = max(1, free)
    # Without a whole card, the rest of one that other pools use in part.
    rest = 1.0 if free > 0 else max(0.0, num_gpus - reserved)
    room = rest - CLASSIFIER_SHARE * math.ceil(classifiers / cards)
    share = math.floor(100 * room / math.ceil(generators / cards) + _EPSILON) / 100
    return max(CLASSIFIER_SHARE, share)
