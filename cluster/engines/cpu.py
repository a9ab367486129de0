"""What the processor can do; loads torch."""

import torch


def computes_in_bfloat16() -> bool:
    """Whether it multiplies bfloat16 matrices natively; elsewhere that is emulated, and slow."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
