"""BERT without padding; see ``network`` for how it computes and ``linear`` for what makes it fast.

Imports run one way: ``linear → layer, quantize → network → layout → attention → bert, varlen``.
"""

from cluster.engines.classifier.model.packed.bert import PackedBert

__all__ = ["PackedBert"]
