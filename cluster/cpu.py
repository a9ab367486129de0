"""CPU capabilities; imports torch."""

import torch


def has_native_bfloat16() -> bool:
    """Return True if the CPU multiplies bfloat16 matrices natively; emulation is slow."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
