"""BERT without padding; see ``bert`` for how it computes and ``linear`` for what makes it fast.

Imports run one way: ``layout → attention, linear → layer, quantize → bert``.
"""

from cluster.engines.encoder.packed.bert import PackedBert

__all__ = ["PackedBert"]
