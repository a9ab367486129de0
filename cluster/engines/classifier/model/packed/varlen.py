"""BERT without padding, on a GPU: attention of variable length, and CUDA graphs.

A graph wants the same shapes and the same memory each time, so there are slots of buffers for a few
numbers of tokens. A batch is written into the smallest slot that holds it, from pinned memory and
on a stream of its own; what is left over in the slot belongs to a text that nobody reads. Copies
have slots and streams of their own, so that one can fill and upload while another computes.
``graphs`` and ``attend`` stand apart from the rest, so that a CPU can run all but these two.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.config import ClassifierTask
from cluster.engines.classifier.model.packed.layout import round_up
from cluster.engines.classifier.model.packed.linear import Arithmetic
from cluster.engines.classifier.model.packed.network import Packed, PackedNetwork
from cluster.engines.classifier.model.pooling import Pooling
from cluster.engines.classifier.model.types import Rows, TokenIds

MIN_TOKENS = 64
SLOT_BITS = 3
"""Significant bits of a slot's tokens: at most a fifth is left over, a tenth on average, and there
are four slots, each with a graph for each task, for every doubling of tokens."""
TOKENS_PER_TEXT = 4
"""A slot has room for one text in so many tokens; more and shorter texts take a larger one."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""Query, key and value [tokens, heads, size]; where each text's queries and its keys begin, with
the end of the last; the longest text. → [queries, heads, size]"""


def flash(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, most: int) -> Tensor:
    """PyTorch's flash attention of variable length; see ``Attend``."""
    from torch.nn.attention.varlen import varlen_attn

    context = varlen_attn(q, k, v, starts_q, starts_k, most, most, scale=1.0)
    assert isinstance(context, Tensor)
    return context


@dataclass(frozen=True, slots=True)
class VarlenAttention:
    """See ``layer.Attention``."""

    attend: Attend
    heads: int
    starts: Tensor
    """[texts + 1], int32."""
    most: int
    """Tokens of the slot: no text is longer."""

    def all(self, projected: Tensor) -> Tensor:
        """See ``layer.Attention``."""
        query, key, value = projected.view(len(projected), 3, self.heads, -1).unbind(1)
        context = self.attend(query, key, value, self.starts, self.starts, self.most)
        return context.reshape(len(projected), -1)

    def firsts(self, query: Tensor, projected: Tensor) -> Tensor:
        """See ``layer.Attention``."""
        key, value = projected.view(len(projected), 2, self.heads, -1).unbind(1)
        queries = query.view(len(query), self.heads, -1)
        ones = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
        starts = self.starts[: len(query) + 1]  # without the text that nobody reads
        context = self.attend(queries, key, value, ones, starts, self.most)
        return context.reshape(len(query), -1)


class Slot:
    """The buffers for batches of up to ``tokens`` tokens: host and device, of the same shapes."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.tokens, self.texts = tokens, tokens // TOKENS_PER_TEXT
        pinned = device.type == "cuda"
        shapes = {"ids": tokens, "positions": tokens, "second": tokens, "owners": tokens}
        shapes |= {"firsts": self.texts, "starts": self.texts + 2}
        types = dict.fromkeys(shapes, torch.int64) | {"starts": torch.int32}
        self.host = {
            name: torch.zeros(size, dtype=types[name], pin_memory=pinned)
            for name, size in shapes.items()
        }
        self.device = {name: buffer.to(device) for name, buffer in self.host.items()}
        self.graphs: dict[ClassifierTask, tuple[Any, Tensor]] = {}

    def fill(self, ids: Sequence[TokenIds]) -> None:
        """Write a batch into the host's buffers."""
        lengths = np.array([len(row) for row in ids])
        ends = np.cumsum(lengths)
        used, texts = int(ends[-1]), len(ids)
        tokens = np.concatenate(ids)
        host = {name: buffer.numpy() for name, buffer in self.host.items()}
        for name in ("ids", "positions", "second"):
            host[name][used:] = 0
        host["ids"][:used] = np.where(tokens < 0, ~tokens, tokens)
        host["second"][:used] = tokens < 0
        host["positions"][:used] = np.arange(used) - np.repeat(ends - lengths, lengths)
        host["owners"][:used] = np.repeat(np.arange(texts), lengths)
        host["owners"][used:] = self.texts
        host["firsts"][:texts], host["firsts"][texts:] = ends - lengths, 0
        host["starts"][0] = 0
        host["starts"][1 : texts + 1], host["starts"][texts + 1 :] = ends, used
        host["starts"][-1] = self.tokens


class VarlenBert:
    """See ``EncoderModel``; for what ``packed.network.supports``.

    Args:
        network: Is left as it is.
        how: The types and layers that it computes with.
        pooling: How embeddings are made.
        attend: Attention.
        graphs: Whether to capture CUDA graphs.
    """

    def __init__(
        self,
        network: Any,
        how: Arithmetic,
        pooling: Pooling,
        attend: Attend = flash,
        graphs: bool = True,
    ) -> None:
        self._network = PackedNetwork(network, how, pooling)
        self._heads = int(network.config.num_attention_heads)
        self._device: torch.device = network.device
        self._attend, self._graphs = attend, graphs
        self._launching = threading.Lock()  # of all copies: a capture wants nobody beside it
        self._own()

    def __copy__(self) -> "VarlenBert":
        """One that shares the weights and may run at the same time."""
        made = object.__new__(VarlenBert)
        made.__dict__.update(self.__dict__)
        made._own()
        return made

    def _own(self) -> None:
        on_gpu = self._device.type == "cuda"
        self._input = torch.cuda.Stream() if on_gpu else None  # type: ignore[no-untyped-call]
        self._slots: dict[int, Slot] = {}
        self.padding = 0.0
        """See ``EncoderModel``."""

    @torch.inference_mode()
    def run(self, task: ClassifierTask, ids: Sequence[TokenIds]) -> Rows:
        """See ``EncoderModel``."""
        slot = self._slot(ids)
        slot.fill(ids)
        with self._launching:
            self._upload(slot)
            rows = self._replay(task, slot) if self._graphs else self._forward(task, slot)
        return np.asarray(rows[: len(ids)].cpu().numpy(), np.float32)

    def _slot(self, ids: Sequence[TokenIds]) -> Slot:
        used = sum(map(len, ids))
        wanted = max(MIN_TOKENS, used, len(ids) * TOKENS_PER_TEXT)
        size = round_up(wanted, SLOT_BITS)
        self.padding += size - used
        if size not in self._slots:
            self._slots[size] = Slot(size, self._device)
        return self._slots[size]

    def _upload(self, slot: Slot) -> None:
        with torch.cuda.stream(self._input):  # does nothing where there is no such stream
            for name, buffer in slot.host.items():
                slot.device[name].copy_(buffer, non_blocking=True)
        if self._input is not None:
            torch.cuda.current_stream().wait_stream(self._input)

    def _replay(self, task: ClassifierTask, slot: Slot) -> Tensor:
        if task not in slot.graphs:
            self._forward(task, slot)  # libraries choose and load their kernels
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                rows = self._forward(task, slot)
            slot.graphs[task] = graph, rows
        graph, rows = slot.graphs[task]
        graph.replay()
        return rows

    def _forward(self, task: ClassifierTask, slot: Slot) -> Tensor:
        at = slot.device
        starts = at["starts"]
        packed = Packed(
            tokens=at["ids"],
            second=at["second"].unsqueeze(1),
            positions=at["positions"],
            firsts=at["firsts"],
            owners=at["owners"],
        )
        attention = VarlenAttention(self._attend, self._heads, starts, slot.tokens)
        if task == "classify":
            return self._network.scores(packed, attention)
        return self._network.vectors(packed, attention)
