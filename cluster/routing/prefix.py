"""Where a prompt's first token would come first.

One cost weighs the cache against load, in seconds: what waits and decodes before the request, and
what of its prompt is not cached. So a prefix that many ask for is computed on a second replica as
soon as waiting for the first one takes longer. Work that a replica was given above its share counts
too, but never more than the whole prompt: one that hangs gets nothing for having had less.
"""

import numpy as np

from cluster.routing.arrays import FloatArray, IntArray
from cluster.routing.fleet import Fleet
from cluster.routing.prefix_index import Level, PrefixIndex
from cluster.routing.request import RequestView
from cluster.routing.ties import Turns

MISS_WEIGHT = 1.5
"""What computing a token counts against waiting for one: whoever comes after waits for it as well,
so equal prompts that come at once stay together although each would begin as soon elsewhere."""
DECODE_WEIGHT = 0.5
"""What a second of decoding counts against one of prefill: a first token does not wait for streams,
they only make steps longer. At 1 chats lose 3 of 65 points of hits for a balance that brings
nothing; at 0.2 they win 2 more, but a burst of equal prompts stays together for too long."""
SHARE = 1.0
"""Of the mean of the work that replicas were given, what each may have, and one prompt more."""
ADAPTER_LOAD_S = 1.0
"""What loading a LoRA adapter costs; vLLM reads some tens of MB and waits for a step."""
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") + 0.0
"""The bits of each byte, the lowest first."""


class PrefixAffinity:
    """The replica with the least expected time to the first token, where all get their share."""

    def __init__(self, index: PrefixIndex, seed: int = 0) -> None:
        self._index = index
        self._turns = Turns(seed)
        self._bits: IntArray = np.zeros(0, np.intp)
        self._bits_of = (-1, -1)
        self._num_bytes = 0

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        """The replica with the least cost among those with room; equals take turns."""
        tokens = MISS_WEIGHT * request.prompt_tokens
        whole_s = request.prompt_tokens / fleet.prefill_rate.prior
        share_s = SHARE * fleet.mean_given_s + whole_s
        cost = fleet.costs_s(DECODE_WEIGHT, tokens, share_s, MISS_WEIGHT * whole_s)
        if levels := self._index.levels(request.prefix):
            held = self._held_tokens(levels, request, fleet)
            held *= fleet.slots.hit_s
            cost -= held
        if request.adapter is not None:
            cost += ADAPTER_LOAD_S * fleet.adapters.loads(request.adapter)
        slot = self._turns.least(cost)
        return None if slot is None else fleet.ids[slot]

    def _held_tokens(self, levels: list[Level], request: RequestView, fleet: Fleet) -> FloatArray:
        """Prompt tokens that each slot has cached, by what a miss weighs."""
        versions = (fleet.version, self._index.version)
        if versions != self._bits_of:
            bits = [0 if name is None else self._index.bit_of(name) for name in fleet.ids]
            self._bits, self._bits_of = np.array(bits, np.intp), versions
            self._num_bytes = max(bits) // 8 + 1
        size = self._num_bytes
        known = (1 << 8 * size) - 1  # the index may hold replicas that are not in the fleet
        steps, end = [], 0.0
        for count, _ in levels:
            last, end = end, min(request.prefix_tokens[count - 1], request.prompt_tokens)
            steps.append(MISS_WEIGHT * (end - last))
        packed = b"".join([(mask & known).to_bytes(size, "little") for _, mask in levels])
        held = _BITS.take(np.frombuffer(packed, np.uint8), axis=0).reshape(len(levels), -1)
        tokens: FloatArray = np.array(steps).dot(held).take(self._bits)
        return tokens
