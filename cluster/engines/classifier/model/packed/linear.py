"""Linear layers as the packed model calls them, and oneDNN's as the fast way.

oneDNN's operators are private to PyTorch, so they are tried on the layer itself before they are
used; where they are missing or disagree, plain PyTorch computes the same.
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
"""transformers' names of activations that oneDNN computes within the matrix product, and its."""
PROBE_ROWS = 16
PROBE_TOLERANCE = 16
"""In units of the type's rounding error, at the largest number of the result."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A linear layer and the activation that follows it."""

    weight: Tensor
    """[outputs, inputs]"""
    bias: Tensor
    activation: str | None = None
    """transformers' name of it."""

    @classmethod
    def of(cls, *modules: Any, activation: str | None = None) -> "Weights":
        """One layer that gives the outputs of all ``modules`` side by side."""
        weight = torch.cat([module.weight.detach() for module in modules])
        bias = torch.cat([module.bias.detach() for module in modules])
        return cls(weight, bias, activation)

    def rows(self, start: int, stop: int | None) -> "Weights":
        """The part of the layer that gives these outputs."""
        return Weights(self.weight[start:stop], self.bias[start:stop], self.activation)

    def scaled(self, factor: float, stop: int) -> "Weights":
        """With the first ``stop`` outputs multiplied by ``factor``."""
        factors = torch.ones_like(self.bias)
        factors[:stop] = factor
        weight = self.weight * factors.unsqueeze(1)
        return Weights(weight, self.bias * factors, self.activation)

    def to(self, dtype: torch.dtype) -> "Weights":
        """In another type."""
        return Weights(self.weight.to(dtype), self.bias.to(dtype), self.activation)


class Linear(Protocol):
    """A linear layer with its activation."""

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, inputs] → [rows, outputs]"""

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The same, and ``residual`` [rows, outputs] added; for layers without activation."""


MakeLinear = Callable[[str, Weights], Linear]
"""Makes the layer that has this name within the model."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How a packed model computes."""

    hidden: torch.dtype
    """The type of the residual stream, the norms, and the weights that ``make`` is given."""
    attention: torch.dtype
    """The type of what the query, key and value layers give."""
    make: MakeLinear

    @classmethod
    def plain(cls, dtype: torch.dtype) -> "Arithmetic":
        """Everything in one type."""
        return cls(dtype, dtype, make_linear)

    def linear(self, name: str, weights: Weights) -> Linear:
        """The layer ``name``."""
        return self.make(name, weights.to(self.hidden))


class PlainLinear:
    """With PyTorch's public functions."""

    def __init__(self, weights: Weights) -> None:
        self._weight, self._bias = weights.weight, weights.bias
        self._activation = activation_of(weights.activation)

    def __call__(self, x: Tensor) -> Tensor:
        """See ``Linear``."""
        y = functional.linear(x, self._weight, self._bias)
        return self._activation(y) if self._activation else y

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """See ``Linear``."""
        return functional.linear(x, self._weight, self._bias).add_(residual)


class PrepackedLinear:
    """With weights laid out for oneDNN once; activation and residual within the product.

    Raises:
        AttributeError, RuntimeError: this PyTorch or this processor has no such operator.
    """

    def __init__(self, weights: Weights) -> None:
        operator = torch.ops.mkldnn._linear_pointwise
        self._linear, self._linear_plus = operator.default, operator.binary
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weights.weight.contiguous(), None)
        self._bias = weights.bias
        fused = FUSED_ACTIVATIONS.get(weights.activation or "")
        attribute, algorithm = fused or ("none", "")
        self._fused: tuple[str, list[Any], str] = attribute, [], algorithm
        self._activation = None if fused else activation_of(weights.activation)

    def __call__(self, x: Tensor) -> Tensor:
        """See ``Linear``."""
        y: Tensor = self._linear(x, self._weight, self._bias, *self._fused)
        return self._activation(y) if self._activation else y

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """See ``Linear``."""
        y: Tensor = self._linear_plus(x, residual, self._weight, self._bias, "add")
        return y


def make_linear(name: str, weights: Weights) -> Linear:
    """The fastest layer that computes ``weights`` where they are."""
    plain = PlainLinear(weights)
    if weights.weight.device.type != "cpu":
        return plain
    try:
        packed = PrepackedLinear(weights)
        if _agree(packed, plain, weights):
            return packed
        log.warning("%s: oneDNN's result differs from PyTorch's, which is used", name)
    except (AttributeError, RuntimeError, TypeError) as error:
        log.info("%s: no prepacked weights here (%s)", name, error)
    return plain


def activation_of(name: str | None) -> Callable[[Tensor], Tensor] | None:
    """The function of an activation that transformers knows by ``name``."""
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
        residual = pairs[0][1]  # not its negative: differences of rounding would remain
        pairs.append((one.plus(x, residual), other.plus(x, residual)))
    return all(_near(found.float(), wanted.float(), x.dtype) for found, wanted in pairs)


def _near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    tolerance = PROBE_TOLERANCE * torch.finfo(dtype).eps
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())
