"""Counting, naming and reading of real GPUs."""

import torch

from cluster.config.file import load
from cluster.devices import load_nvml
from cluster.devices.nvml import NvmlReader
from cluster.engines.vllm.workers import describe_worker
from cluster.launch.gpus import check_gpus_fit, count_gpus, gpu_settings
from tests.running import ROOT


def test_the_default_configuration_fits_on_the_gpus_of_this_machine():
    path = ROOT / "ray-config.yaml"
    number = count_gpus()
    assert number == torch.cuda.device_count()
    check_gpus_fit(load(path, gpu_settings(load(path).config, number)).config, number)


def test_nvml_reads_the_gpu_that_a_worker_describes():
    torch.zeros(1 << 20, device="cuda")
    device = str(describe_worker(None)["device"])
    (reading,) = NvmlReader(load_nvml(), [device]).read()
    assert reading.device == device
    assert not reading.lost
    assert reading.memory_used_bytes
    assert reading.xids == ()
