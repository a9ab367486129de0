"""Linear layers of the packed model, by oneDNN if possible.

oneDNN's operators are private to PyTorch. Each layer is therefore checked when it is made; if the
operators are missing or give other results, plain PyTorch computes the layer.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

log = logging.getLogger(__name__)

FUSED_ACTIVATIONS = {"gelu": ("gelu", "none"), "relu": ("relu", "")}
"""Activations that oneDNN fuses into the matrix product, by transformers' name."""
PROBE_ROWS = 16
PROBE_TOLERANCE = 16
"""Largest accepted difference from PyTorch, in rounding errors of the largest result."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of a linear layer, and the activation after it."""

    weight: Tensor
    """[outputs, inputs]"""
    bias: Tensor
    activation: str | None = None
    """Activation by transformers' name."""

    @classmethod
    def from_modules(cls, *modules: Any, activation: str | None = None) -> "Weights":
        """Return one layer that computes the outputs of all ``modules`` side by side."""
        weight = torch.cat([module.weight.detach() for module in modules])
        bias = torch.cat([module.bias.detach() for module in modules])
        return cls(weight, bias, activation)

    def rows(self, start: int, stop: int | None) -> "Weights":
        """Return the part of the layer that computes the outputs ``start`` to ``stop``."""
        return Weights(self.weight[start:stop], self.bias[start:stop], self.activation)

    def scaled(self, factor: float, stop: int) -> "Weights":
        """Return the layer with its first ``stop`` outputs multiplied by ``factor``."""
        factors = torch.ones_like(self.bias)
        factors[:stop] = factor
        weight = self.weight * factors.unsqueeze(1)
        return Weights(weight, self.bias * factors, self.activation)

    def to(self, dtype: torch.dtype) -> "Weights":
        return Weights(self.weight.to(dtype), self.bias.to(dtype), self.activation)


class Linear(Protocol):
    """Linear layer with its activation."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map [rows, inputs] to [rows, outputs]."""

    def with_residual(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return ``self(x) + residual``, [rows, outputs]; for layers without activation."""


MakeLinear = Callable[[str, Weights], Linear]
"""Maker of the layer with a given name within the model."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Number types and linear layers of a packed model."""

    hidden: torch.dtype
    """Type of the residual stream, the norms, and the weights passed to ``make``."""
    attention: torch.dtype
    """Type of the query, key and value layers' outputs."""
    make: MakeLinear

    @classmethod
    def plain(cls, dtype: torch.dtype) -> "Arithmetic":
        return cls(dtype, dtype, make_linear)

    def linear(self, name: str, weights: Weights) -> Linear:
        """Return the layer ``name``."""
        return self.make(name, weights.to(self.hidden))


class PlainLinear:
    """``Linear`` by PyTorch's public functions."""

    def __init__(self, weights: Weights) -> None:
        self._weight, self._bias = weights.weight, weights.bias
        self._activation = activation_function(weights.activation)

    def __call__(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self._weight, self._bias)
        return self._activation(y) if self._activation else y

    def with_residual(self, x: Tensor, residual: Tensor) -> Tensor:
        return functional.linear(x, self._weight, self._bias).add_(residual)


class PrepackedLinear:
    """``Linear`` by oneDNN: weights in its own layout, activation and residual fused.

    Raises:
        AttributeError, RuntimeError: This PyTorch or this CPU has no such operator.
    """

    def __init__(self, weights: Weights) -> None:
        operator = torch.ops.mkldnn._linear_pointwise
        self._linear, self._linear_binary = operator.default, operator.binary
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weights.weight.contiguous(), None)
        self._bias = weights.bias
        fused = FUSED_ACTIVATIONS.get(weights.activation or "")
        attribute, algorithm = fused or ("none", "")
        self._fused: tuple[str, list[Any], str] = attribute, [], algorithm
        self._activation = None if fused else activation_function(weights.activation)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._linear(x, self._weight, self._bias, *self._fused)
        return self._activation(y) if self._activation else y

    def with_residual(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = self._linear_binary(x, residual, self._weight, self._bias, "add")
        return y


def make_linear(name: str, weights: Weights) -> Linear:
    """Return the fastest correct layer on the weights' device."""
    plain = PlainLinear(weights)
    if weights.weight.device.type != "cpu":
        return plain
    try:
        packed = PrepackedLinear(weights)
        if _agree(packed, plain, weights):
            return packed
        log.warning("%s: oneDNN and PyTorch give different results; using PyTorch", name)
    except (AttributeError, RuntimeError, TypeError) as error:
        log.info("%s: oneDNN is not available (%s); using PyTorch", name, error)
    return plain


def activation_function(name: str | None) -> Callable[[Tensor], Tensor] | None:
    """Return the function of an activation by transformers' name."""
    if name is None:
        return None
    from transformers.activations import ACT2FN

    function: Callable[[Tensor], Tensor] = ACT2FN[name]
    return function


@torch.inference_mode()
def _agree(one: Linear, other: Linear, weights: Weights) -> bool:
    inputs = weights.weight.shape[1]
    x = torch.linspace(-1, 1, PROBE_ROWS * inputs).view(PROBE_ROWS, inputs).to(weights.bias.dtype)
    pairs = [(one(x), other(x))]
    if weights.activation is None:
        residual = pairs[0][1]  # not its negative, which would leave only rounding errors
        pairs.append((one.with_residual(x, residual), other.with_residual(x, residual)))
    return all(_near(found.float(), wanted.float(), x.dtype) for found, wanted in pairs)


def _near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    tolerance = PROBE_TOLERANCE * torch.finfo(dtype).eps
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())
