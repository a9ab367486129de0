"""Linear layers in 8-bit integers: signed weights per output, unsigned activations per layer.

Scales are fixed when the model is loaded, from the activations that some texts cause in the float32
model. A text's scores therefore do not depend on the other texts of its batch. Input channels with
large values are divided by a factor that their weights are multiplied by (SmoothQuant,
arXiv:2211.10438). Layers that write to the residual stream stay in bfloat16: GELU leaves a few
values so large that 8 bits do not resolve the others (see docs/performance.md).
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

ACTIVATION_LEVELS = 255
WEIGHT_LEVELS = 127
SMOOTHING = 0.5
"""SmoothQuant's alpha."""
QUANTIZED = ("query_key_value", "query", "key_value", "up")
"""Quantized layers; together 7/12 of the multiplications of an encoder layer."""
RESULT_DTYPE = torch.bfloat16


@dataclass(slots=True)
class ActivationRange:
    """Smallest and largest value per input channel, zero included."""

    low: Tensor
    high: Tensor

    def widen(self, x: Tensor) -> None:
        """Extend the range to the values in ``x``, [rows, inputs]."""
        self.low = torch.minimum(self.low, x.amin(0))
        self.high = torch.maximum(self.high, x.amax(0))


@dataclass(frozen=True, slots=True)
class RangeObserver:
    """Maker of plain layers that record the range of their inputs."""

    ranges: dict[str, ActivationRange] = field(default_factory=dict)
    """Ranges by layer name."""

    def __call__(self, name: str, weights: Weights) -> Linear:
        zeros = torch.zeros(weights.weight.shape[1])
        self.ranges[name] = ActivationRange(zeros, zeros)
        return _ObservedLinear(weights, self.ranges[name])


class _ObservedLinear(PlainLinear):
    def __init__(self, weights: Weights, input_range: ActivationRange) -> None:
        super().__init__(weights)
        self._input_range = input_range

    def __call__(self, x: Tensor) -> Tensor:
        self._input_range.widen(x)
        return super().__call__(x)


def quantized_arithmetic(ranges: dict[str, ActivationRange]) -> Arithmetic:
    """Return arithmetic with 8-bit layers for observed ranges and bfloat16 for the others."""
    # Filter once, here: filters set during computing would apply to all threads.
    warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)

    def make(name: str, weights: Weights) -> Linear:
        if name.rpartition(".")[2] not in QUANTIZED or not ranges[name].high.any():
            return make_linear(name, weights)
        return QuantizedLinear(weights, ranges[name])

    return Arithmetic(RESULT_DTYPE, RESULT_DTYPE, make)


class QuantizedLinear:
    """``Linear`` by oneDNN's 8-bit product; returns bfloat16.

    Args:
        weights: Weights of any floating type.
        input_range: Range of the layer's inputs.

    Raises:
        AttributeError, RuntimeError: This PyTorch or this CPU has no such operator.
    """

    def __init__(self, weights: Weights, input_range: ActivationRange) -> None:
        self._linear = torch.ops.onednn.qlinear_pointwise.default
        weight = weights.weight.float()
        largest = torch.maximum(input_range.high, -input_range.low).clamp(min=1e-5)
        smooth = largest**SMOOTHING / weight.abs().amax(0).clamp(min=1e-5) ** (1 - SMOOTHING)
        weight = weight * smooth
        scales = weight.abs().amax(1).clamp(min=1e-12) / WEIGHT_LEVELS
        rounded = (weight / scales.unsqueeze(1)).round().to(torch.int8)
        low = (input_range.low / smooth).min().item()
        high = (input_range.high / smooth).max().item()
        self._scale = (high - low) / ACTIVATION_LEVELS
        self._zero = round(-low / self._scale)
        self._smooth = smooth.reciprocal()
        zeros = torch.zeros(len(scales), dtype=torch.int32)
        packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        attribute, algorithm = FUSED_ACTIVATIONS.get(weights.activation or "", ("none", ""))
        if weights.activation and attribute == "none":
            raise RuntimeError(f"oneDNN does not fuse the activation {weights.activation}")
        self._fixed = (packed, scales, zeros, weights.bias.float(), 1.0, 0, RESULT_DTYPE)
        self._activation: tuple[str, list[Any], str] = attribute, [], algorithm

    def __call__(self, x: Tensor) -> Tensor:
        # PyTorch multiplies tensors of different types several times slower.
        smoothed = x.to(torch.float32, copy=True).mul_(self._smooth)
        bits = quantize(smoothed, self._scale, self._zero)
        y: Tensor = self._linear(bits, self._scale, self._zero, *self._fixed, *self._activation)
        return y

    def with_residual(self, x: Tensor, residual: Tensor) -> Tensor:
        return self(x).add_(residual)


def quantize(x: Tensor, scale: float, zero: int) -> Tensor:
    """Return float32 ``x / scale + zero``, rounded and clamped to 0 … 255, as uint8."""
    # quantize_per_tensor takes one pass where float arithmetic takes five. Its storage holds the
    # bytes in the order of x, so they can be viewed as uint8.
    quantized = torch.quantize_per_tensor(x, scale, zero, torch.quint8)
    empty = torch.empty(0, dtype=torch.uint8)
    return empty.set_(quantized.untyped_storage(), 0, x.shape, x.stride())
