"""The GPUs of a replica: what NVML says of them, and when one of them has failed.

``nvml`` reads, with NVIDIA's library given to it; ``health`` decides and is pure; ``watch`` does
both every few seconds. Without a GPU there is no watch and no figure.
"""

from cluster.devices.nvml import load_nvml
from cluster.devices.watch import DeviceWatch

__all__ = ["DeviceWatch", "load_nvml"]
