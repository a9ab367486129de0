"""Linear layers in 8-bit integers: weights signed by output, activations unsigned by layer.

Scales are fixed when the model is loaded, from what each layer was given while some texts went
through the float32 model, so a text's scores do not depend on the texts beside it. An input channel
with large numbers is divided by a factor that its weights are multiplied by (SmoothQuant,
arXiv:2211.10438). Layers that give the residual stream stay in bfloat16: what GELU leaves has a few
numbers so large that 8 bits do not hold the others (see docs/performance.md).
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cluster.engines.classifier.model.packed.linear import (
    FUSED_ACTIVATIONS,
    Arithmetic,
    Linear,
    PlainLinear,
    Weights,
    make_linear,
)

LEVELS = 255
WEIGHT_LEVELS = 127
SMOOTHING = 0.5
QUANTIZED = ("query_key_value", "query", "key_value", "up")
"""Seven twelfths of the multiplications of a layer."""
RESULT = torch.bfloat16


@dataclass(slots=True)
class Ranges:
    """The least and the greatest number seen by input channel; both include zero."""

    low: Tensor
    high: Tensor

    def see(self, x: Tensor) -> None:
        """Widen them to what is in ``x``, [rows, inputs]."""
        self.low = torch.minimum(self.low, x.amin(0))
        self.high = torch.maximum(self.high, x.amax(0))


@dataclass(frozen=True, slots=True)
class Observer:
    """Makes plain layers that note what they are given, by name."""

    seen: dict[str, Ranges] = field(default_factory=dict)

    def __call__(self, name: str, weights: Weights) -> Linear:
        """See ``MakeLinear``."""
        nothing = torch.zeros(weights.weight.shape[1])
        self.seen[name] = Ranges(nothing, nothing)
        return _ObservedLinear(PlainLinear(weights), self.seen[name])


class _ObservedLinear:
    def __init__(self, linear: Linear, seen: Ranges) -> None:
        self._linear, self._seen = linear, seen

    def __call__(self, x: Tensor) -> Tensor:
        self._seen.see(x)
        return self._linear(x)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._linear.plus(x, residual)


def observed(observer: Observer) -> Arithmetic:
    """Float32 that ``observer`` watches."""
    return Arithmetic(torch.float32, torch.float32, observer)


def quantized(seen: dict[str, Ranges]) -> Arithmetic:
    """8-bit layers for what an observer saw, and bfloat16 for everything else."""
    # Here, once: what a thread filters while it computes, it filters for all threads.
    warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)

    def make(name: str, weights: Weights) -> Linear:
        if name.rpartition(".")[2] not in QUANTIZED or not seen[name].high.any():
            return make_linear(name, weights)
        return QuantizedLinear(weights, seen[name])

    return Arithmetic(RESULT, RESULT, make)


class QuantizedLinear:
    """One layer with oneDNN's 8-bit product; gives bfloat16.

    Args:
        weights: Any floating type.
        seen: What it is given.

    Raises:
        AttributeError, RuntimeError: this PyTorch or this processor has no such operator.
    """

    def __init__(self, weights: Weights, seen: Ranges) -> None:
        self._linear = torch.ops.onednn.qlinear_pointwise.default
        weight = weights.weight.float()
        largest = torch.maximum(seen.high, -seen.low).clamp(min=1e-5)
        smooth = largest**SMOOTHING / weight.abs().amax(0).clamp(min=1e-5) ** (1 - SMOOTHING)
        weight = weight * smooth
        scales = weight.abs().amax(1).clamp(min=1e-12) / WEIGHT_LEVELS
        rounded = (weight / scales.unsqueeze(1)).round().to(torch.int8)
        low, high = (seen.low / smooth).min().item(), (seen.high / smooth).max().item()
        self._scale = (high - low) / LEVELS
        self._zero = round(-low / self._scale)
        self._smooth = smooth.reciprocal()
        zeros = torch.zeros(len(scales), dtype=torch.int32)
        packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        attribute, algorithm = FUSED_ACTIVATIONS.get(weights.activation or "", ("none", ""))
        if weights.activation and attribute == "none":
            raise RuntimeError(f"the activation {weights.activation} is not fused")
        self._rest = (packed, scales, zeros, weights.bias.float(), 1.0, 0, RESULT)
        self._activation: tuple[str, list[Any], str] = attribute, [], algorithm

    def __call__(self, x: Tensor) -> Tensor:
        """See ``Linear``."""
        given = eight_bits(x * self._smooth, self._scale, self._zero)
        y: Tensor = self._linear(given, self._scale, self._zero, *self._rest, *self._activation)
        return y

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """See ``Linear``."""
        return self(x).add_(residual)


def eight_bits(x: Tensor, scale: float, zero: int) -> Tensor:
    """float32 ``x / scale + zero``, rounded and cut to 0 … 255, as uint8."""
    # One pass where arithmetic on floats takes five; the bytes are used as they lie in memory.
    given = torch.quantize_per_tensor(x, scale, zero, torch.quint8)
    empty = torch.empty(0, dtype=torch.uint8)
    return empty.set_(given.untyped_storage(), 0, x.shape, x.stride())
