"""BERT without padding on a GPU: variable-length attention and CUDA graphs.

A graph needs the same shapes and the same memory on every replay. There are buffers for a few
numbers of tokens. A batch is written into the smallest buffers that fit, in pinned memory, and
uploaded on a stream; the rest of the buffers becomes texts whose results are dropped. Each copy of
the model has buffers and a stream, so one can fill and upload while another computes. ``graphs``
and ``attend`` are parameters, so that a CPU can test everything else.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.engines.classifier.model.outputs import Pooling
from cluster.engines.classifier.model.packed.layout import round_up
from cluster.engines.classifier.model.packed.linear import Arithmetic
from cluster.engines.classifier.model.packed.network import Packed, PackedNetwork
from cluster.engines.classifier.model.types import Head, Rows, TokenIds, split_by_length

MIN_TOKENS = 64
SIZE_BITS = 3
"""Significant bits of buffer sizes. At most a fifth of a buffer is unused, 8 % on average;
there are four sizes per doubling of tokens, each with a graph per task."""
TOKENS_PER_TEXT = 4
"""Tokens per text for which buffers have room; batches of more and shorter texts use larger
ones."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""Variable-length attention: query, key and value [tokens, heads, size]; the start of each text's
queries and of its keys, followed by the end of the last; the longest text. Returns [queries, heads,
size]."""


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, max_length: int
) -> Tensor:
    """Compute PyTorch's variable-length flash attention; see ``Attend``."""
    from torch.nn.attention.varlen import varlen_attn

    # A single split: with several, scores depend on the longest text of the batch.
    longest = max_length, max_length
    context = varlen_attn(q, k, v, starts_q, starts_k, *longest, scale=1.0, num_splits=1)
    assert isinstance(context, Tensor)
    return context


@dataclass(frozen=True, slots=True)
class VarlenAttention:
    """``Attention`` of one batch by an ``Attend`` function."""

    attend: Attend
    heads: int
    starts: Tensor
    """First token of each text and the end of the last, [texts + 1], int32."""
    max_length: int
    """Upper bound of a text's length, in tokens; the kernel starts a block for each part of it."""

    def attend_all(self, projected: Tensor) -> Tensor:
        query, key, value = projected.view(len(projected), 3, self.heads, -1).unbind(1)
        context = self.attend(query, key, value, self.starts, self.starts, self.max_length)
        return context.reshape(len(projected), -1)

    def attend_first(self, query: Tensor, projected: Tensor) -> Tensor:
        key, value = projected.view(len(projected), 2, self.heads, -1).unbind(1)
        queries = query.view(len(query), self.heads, -1)
        ones = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
        starts = self.starts[: len(query) + 1]  # as many texts as the buffers have room for
        context = self.attend(queries, key, value, ones, starts, self.max_length)
        return context.reshape(len(query), -1)


def buffer_sizes(max_tokens: int) -> list[int]:
    """Return the sizes of the buffers for batches of up to ``max_tokens`` tokens, ascending."""
    sizes = [round_up(MIN_TOKENS, SIZE_BITS)]
    while sizes[-1] < max_tokens:
        sizes.append(round_up(sizes[-1] + 1, SIZE_BITS))
    return sizes


class Buffers:
    """Host and device buffers for batches of up to ``tokens`` tokens.

    ``longest`` is the length of the longest text; the unused rest of the buffers becomes texts of
    at most this length.
    """

    def __init__(self, tokens: int, device: torch.device, longest: int) -> None:
        self.tokens, self.texts = tokens, tokens // TOKENS_PER_TEXT
        self.longest = min(tokens, longest)
        pinned = device.type == "cuda"
        shapes = {"ids": tokens, "positions": tokens, "second": tokens, "text_index": tokens}
        num_fillers = -(-tokens // self.longest)
        shapes |= {"first_rows": self.texts, "starts": self.texts + num_fillers + 1}
        types = dict.fromkeys(shapes, torch.int64) | {"starts": torch.int32}
        self.host = {
            name: torch.zeros(size, dtype=types[name], pin_memory=pinned)
            for name, size in shapes.items()
        }
        self.device = {name: buffer.to(device) for name, buffer in self.host.items()}
        self.graphs: dict[Head, tuple[Any, Tensor]] = {}

    def fill(self, ids: Sequence[TokenIds]) -> None:
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
        host["text_index"][:used] = np.repeat(np.arange(texts), lengths)
        host["text_index"][used:] = self.texts
        host["first_rows"][:texts], host["first_rows"][texts:] = ends - lengths, 0
        host["starts"][0] = 0
        host["starts"][1 : texts + 1] = ends
        fillers = self.longest * np.arange(1, len(host["starts"]) - texts)
        host["starts"][texts + 1 :] = np.minimum(used + fillers, self.tokens)


class VarlenBert:
    """``EncoderModel`` of BERT on a GPU, for networks that ``packed.network.supports``.

    Args:
        network: The model to copy; it is not changed.
        arithmetic: Number types and linear layers.
        pooling: Pooling of embeddings.
        attend: Variable-length attention.
        graphs: True to capture CUDA graphs.
    """

    def __init__(
        self,
        network: Any,
        arithmetic: Arithmetic,
        pooling: Pooling,
        attend: Attend = flash_attention,
        graphs: bool = True,
    ) -> None:
        self._network = PackedNetwork(network, arithmetic, pooling)
        self._heads = int(network.config.num_attention_heads)
        self._device: torch.device = network.device
        self._attend, self._graphs = attend, graphs
        self._longest = int(network.config.max_position_embeddings)
        self._prepared: tuple[Sequence[Head], int] | None = None
        # Shared by all copies: nothing else may run on the device during a capture.
        self._launch_lock = threading.Lock()
        self._allocate()

    def __copy__(self) -> "VarlenBert":
        """Return a model that shares the weights and may run at the same time."""
        copied = object.__new__(VarlenBert)
        copied.__dict__.update(self.__dict__)
        copied._allocate()
        if self._prepared is not None:
            copied.prepare(*self._prepared)
        return copied

    def _allocate(self) -> None:
        on_gpu = self._device.type == "cuda"
        self._upload_stream = torch.cuda.Stream() if on_gpu else None  # type: ignore[no-untyped-call]
        self._buffers: dict[int, Buffers] = {}
        # Graphs share the memory of their intermediate results, as they never run at once.
        has_pool = on_gpu and self._graphs
        self._pool = torch.cuda.graph_pool_handle() if has_pool else None
        self.padding = 0.0

    @torch.inference_mode()
    def prepare(self, heads: Sequence[Head], max_tokens: int) -> None:
        """Capture the graphs for batches of up to ``max_tokens`` tokens, so that no request waits.

        The largest come first; the smaller ones then fit into their memory. Copies made later are
        prepared, too.
        """
        self._prepared = heads, max_tokens
        if not self._graphs:
            return
        for size in reversed(buffer_sizes(max_tokens)):
            buffers = self._buffers[size] = Buffers(size, self._device, self._longest)
            buffers.fill([np.zeros(1, np.int64)])
            with self._launch_lock:
                self._upload(buffers)
                for head in heads:
                    self._replay(head, buffers)

    @torch.inference_mode()
    def run(self, head: Head, ids: Sequence[TokenIds]) -> Rows | list[Rows]:
        buffers = self._buffers_for(ids)
        buffers.fill(ids)
        with self._launch_lock:
            self._upload(buffers)
            rows = self._replay(head, buffers) if self._graphs else self._forward(head, buffers)
        if head == "embed-tokens":
            return split_by_length(np.asarray(rows.cpu().numpy(), np.float32), ids)
        return np.asarray(rows[: len(ids)].cpu().numpy(), np.float32)

    def _buffers_for(self, ids: Sequence[TokenIds]) -> Buffers:
        used = sum(map(len, ids))
        wanted = max(MIN_TOKENS, used, len(ids) * TOKENS_PER_TEXT)
        size = round_up(wanted, SIZE_BITS)
        self.padding += size - used
        if size not in self._buffers:
            self._buffers[size] = Buffers(size, self._device, self._longest)
        return self._buffers[size]

    def _upload(self, buffers: Buffers) -> None:
        with torch.cuda.stream(self._upload_stream):  # does nothing for None
            for name, buffer in buffers.host.items():
                buffers.device[name].copy_(buffer, non_blocking=True)
        if self._upload_stream is not None:
            torch.cuda.current_stream().wait_stream(self._upload_stream)

    def _replay(self, head: Head, buffers: Buffers) -> Tensor:
        if head not in buffers.graphs:
            self._forward(head, buffers)  # libraries choose and load their kernels
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                rows = self._forward(head, buffers)
            buffers.graphs[head] = graph, rows
        graph, rows = buffers.graphs[head]
        graph.replay()
        return rows.clone()  # the next graph may use its memory

    def _forward(self, head: Head, buffers: Buffers) -> Tensor:
        batch = buffers.device
        packed = Packed(
            tokens=batch["ids"],
            second=batch["second"].unsqueeze(1),
            positions=batch["positions"],
            starts=batch["first_rows"],
            text_index=batch["text_index"],
        )
        attention = VarlenAttention(self._attend, self._heads, batch["starts"], buffers.longest)
        return self._network.run(head, packed, attention)
