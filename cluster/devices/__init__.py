"""GPUs of a replica: readings through NVML, and detection of failed devices.

``nvml`` reads, ``health`` decides (pure), ``watch`` runs both periodically.
"""

from cluster.devices.nvml import load_nvml
from cluster.devices.watch import DeviceWatch

__all__ = ["DeviceWatch", "load_nvml"]
