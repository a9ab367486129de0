"""Prefix affinity: the replica that would produce the request's first token first.

One cost in seconds weighs the cache against load: the work ahead of the request, plus the prefill
of the uncached part of its prompt. A popular prefix is therefore computed on a second replica as
soon as waiting for the first one takes longer. Work that a replica was assigned above its share
counts too, but at most as much as the whole prompt, so a hanging replica does not attract requests
for having had fewer.
"""

import numpy as np

from cluster.routing.fleet import Fleet
from cluster.routing.load_policies import TieBreaker
from cluster.routing.prefix_index import Level, PrefixIndex
from cluster.routing.request import RequestView
from cluster.routing.table import FloatArray, IntArray

MISS_WEIGHT = 1.5
"""Cost of computing a token relative to waiting for one. Above 1 because later requests wait for
the computation as well: equal prompts that arrive at once stay together, although each would start
as soon elsewhere."""
DECODE_WEIGHT = 0.5
"""Cost of a second of decoding relative to a second of prefill. Below 1 because a first token does
not wait for running streams, they only lengthen the steps. Simulated chats lose 3 of 65 points of
hit rate at 1, without a benefit; they gain 2 at 0.2, but bursts stay together for too long."""
SHARE = 1.0
"""Work that a replica may be assigned without extra cost, as a multiple of the mean; plus one
prompt."""
ADAPTER_LOAD_S = 1.0
"""Cost of loading a LoRA adapter: vLLM reads some tens of MB and waits for a step."""
_BYTE_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") + 0.0
"""Bits of each byte as floats, the lowest first, shape (256, 8)."""


class PrefixAffinity:
    """The replica with the lowest expected time to first token, within its share of the work."""

    def __init__(self, index: PrefixIndex, seed: int = 0) -> None:
        self._index = index
        self._ties = TieBreaker(seed)
        self._row_bits: IntArray = np.zeros(0, np.intp)
        self._row_bits_version = (-1, -1)
        self._num_mask_bytes = 0

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        weighted_tokens = MISS_WEIGHT * request.prompt_tokens
        prompt_s = request.prompt_tokens / fleet.speeds.prefill.prior
        share_s = SHARE * fleet.mean_assigned_s + prompt_s
        costs_s = fleet.costs_s(DECODE_WEIGHT, weighted_tokens, share_s, MISS_WEIGHT * prompt_s)
        if levels := self._index.find_levels(request.prefix):
            cached = self._weighted_cached_tokens(levels, request, fleet)
            cached *= fleet.table.hit_s
            costs_s -= cached
        if request.adapter is not None:
            costs_s += ADAPTER_LOAD_S * fleet.adapters.num_loads(request.adapter)
        row = self._ties.cheapest_row(costs_s)
        return None if row is None else fleet.ids[row]

    def _weighted_cached_tokens(
        self, levels: list[Level], request: RequestView, fleet: Fleet
    ) -> FloatArray:
        """Return ``MISS_WEIGHT`` times the prompt tokens that each row has cached."""
        versions = (fleet.version, self._index.version)
        if versions != self._row_bits_version:
            bits = [0 if name is None else self._index.bit_of(name) for name in fleet.ids]
            self._row_bits, self._row_bits_version = np.array(bits, np.intp), versions
            self._num_mask_bytes = max(bits) // 8 + 1
        num_bytes = self._num_mask_bytes
        fleet_mask = (1 << 8 * num_bytes) - 1  # the index may know replicas outside the fleet
        steps, end = [], 0.0
        for count, _ in levels:
            start, end = end, min(request.prefix_tokens[count - 1], request.prompt_tokens)
            steps.append(MISS_WEIGHT * (end - start))
        packed = b"".join([(mask & fleet_mask).to_bytes(num_bytes, "little") for _, mask in levels])
        # One line of bits per level: 1.0 for each replica that holds it.
        bits_held = _BYTE_BITS.take(np.frombuffer(packed, np.uint8), axis=0)
        held = bits_held.reshape(len(levels), -1)
        tokens: FloatArray = np.array(steps).dot(held).take(self._row_bits)
        return tokens
