"""Decoder layers of Llama models on CPUs, as direct calls of vLLM's kernels.

In a small model with few requests, a quarter of vLLM's step is Python, PyTorch's dispatch and new
tensors between the kernels. ``DirectLayer`` calls the kernels that vLLM's layer calls, with the
same values, so its results are the same bits. The layers of a step share its tensors.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from cluster.engines.vllm import internals

NORM_ELEMENTS = 16
"""Elements per step of vLLM's kernels for RMSNorm, which do not check their arguments."""
_UNSCALED_KV = (1.0, 1.0, "auto")  # scales of keys and values, and the type of both


def call_kernels_directly(model: Any) -> int:
    """Replace the forward methods of a model's Llama layers; return their number.

    Leaves a model alone if vLLM computes a layer in another way: other architectures, quantized or
    adapted (LoRA) weights, a quantized KV cache, tensor parallelism, processors without oneDNN.
    """
    num_replaced = 0
    for stack in model.modules():
        if type(stack) is internals.LlamaModel:
            layers = list(stack.layers)[stack.start_layer : stack.end_layer]
            if all(map(_is_supported, layers)):
                _replace(layers)
                num_replaced += len(layers)
    return num_replaced


def _replace(layers: Sequence[Any]) -> None:
    step = _Step()
    for i, layer in enumerate(layers):
        layer.forward = DirectLayer(layer, step, is_first=i == 0).forward


class DirectLayer:
    """A decoder layer's kernels with their constant arguments."""

    def __init__(self, layer: Any, step: "_Step", *, is_first: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._vllm_forward = layer.forward
        self._context = internals.get_forward_context
        self._step = step
        self._is_first = is_first
        self._norm = _Norm(layer.input_layernorm)
        self._qkv = _Linear(attention.qkv_proj)
        self._rotary = _Rotary(attention.rotary_emb, layer.input_layernorm.weight.dtype)
        self._attention = _Attention(attention.attn)
        self._out = _Linear(attention.o_proj)
        self._mlp_norm = _Norm(layer.post_attention_layernorm)
        self._gate_up = _Linear(mlp.gate_up_proj)
        self._down = _Linear(mlp.down_proj)

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute a layer like vLLM's ``LlamaDecoderLayer``; may write to ``hidden``, too."""
        context = self._context()
        step = self._step
        if self._is_first:
            # vLLM has no metadata of attention when it only measures, and several for microbatches.
            step.is_direct = type(context.attn_metadata) is dict and self._norm.takes(hidden)
            if step.is_direct:
                self._allocate(hidden)
        if not step.is_direct:
            result: tuple[torch.Tensor, torch.Tensor] = self._vllm_forward(
                positions, hidden, residual
            )
            return result
        hidden, residual = self._norm.apply(hidden, residual)
        self._qkv.write(step.qkv, hidden)
        self._rotary.turn(positions, step.query, step.key)
        self._attention.write(step, context)
        self._out.write(step.projected, step.attended)
        hidden, residual = self._mlp_norm.apply(step.projected, residual)
        self._gate_up.write(step.gate_up, hidden)
        _silu(step.gate, out=step.gated)
        _mul(step.gated, step.up, out=step.gated)
        self._down.write(step.hidden, step.gated)
        return step.hidden, residual

    def _allocate(self, hidden: torch.Tensor) -> None:
        """Make the tensors of a step of the shape of ``hidden``."""
        step, attention, num_tokens = self._step, self._attention, hidden.shape[0]
        step.qkv = hidden.new_empty(num_tokens, self._qkv.size)
        sizes = [each * attention.head_size for each in attention.num_heads]
        step.query, step.key, value = torch.split(step.qkv, sizes, dim=1)
        step.heads = tuple(
            each.view(num_tokens, -1, attention.head_size) for each in (step.query, step.key, value)
        )
        step.attended = hidden.new_empty(num_tokens, sizes[0])
        step.attended_heads = step.attended.view(num_tokens, -1, attention.head_size)
        step.projected = torch.empty_like(hidden)
        step.gate_up = hidden.new_empty(num_tokens, self._gate_up.size)
        step.gate, step.up = step.gate_up.chunk(2, dim=1)
        step.gated = hidden.new_empty(step.gate.shape)
        step.hidden = torch.empty_like(hidden)


class _Step:
    """Tensors that the layers of one step share.

    A step makes new ones, because vLLM may keep what the last layer returns.
    """

    is_direct: bool
    """False if vLLM's own code computes this step."""
    qkv: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    heads: tuple[torch.Tensor, ...]
    """Queries, keys and values: views of ``qkv``, [tokens, heads, head size]."""
    attended: torch.Tensor
    attended_heads: torch.Tensor
    projected: torch.Tensor
    gate_up: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    gated: torch.Tensor
    hidden: torch.Tensor


class _Norm:
    def __init__(self, norm: Any) -> None:
        self._weight, self._epsilon = norm.weight.data, norm.variance_epsilon
        self._kernel = torch.ops._C.rms_norm.default
        self._add_kernel = torch.ops._C.fused_add_rms_norm.default

    def takes(self, x: torch.Tensor) -> bool:
        return x.dtype == self._weight.dtype and x.dim() == 2 and x.is_contiguous()

    def apply(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the normalized sum and the sum; write both in place if there is a residual."""
        if residual is None:
            out = torch.empty_like(x)
            self._kernel(out, x, self._weight, self._epsilon)
            return out, x
        self._add_kernel(x, residual, self._weight, self._epsilon)
        return x, residual


class _Linear:
    def __init__(self, linear: Any) -> None:
        self._packed = packed = _packed_weights(linear)  # it frees the weights when it is deleted
        self._weights, self.size, self._bias = packed.handler_tensor, packed.n, linear.bias
        self._kernel = torch.ops._C.onednn_mm.default

    def write(self, out: torch.Tensor, x: torch.Tensor) -> None:
        self._kernel(out, x, self._bias, self._weights)


class _Rotary:
    def __init__(self, rotary: Any, dtype: torch.dtype) -> None:
        self._arguments = rotary.head_size, rotary.cos_sin_cache.to(dtype), rotary.is_neox_style
        self._kernel = torch.ops._C.rotary_embedding.default

    def turn(self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> None:
        self._kernel(positions, query, key, *self._arguments)


class _Attention:
    def __init__(self, attn: Any) -> None:
        impl = attn.impl
        self._attn, self._scale, self._softcap = attn, impl.scale, impl.logits_soft_cap
        self._alibi_slopes, self._window = impl.alibi_slopes, impl.sliding_window
        self.head_size = attn.head_size
        self.num_heads = attn.num_heads, attn.num_kv_heads, attn.num_kv_heads
        self._cache: torch.Tensor | None = None
        self._caches: tuple[torch.Tensor, ...] = ()
        self._write_cache = torch.ops._C.cpu_attn_reshape_and_cache.default
        self._kernel = torch.ops._C.cpu_attention_with_kv_cache.default

    def write(self, step: _Step, context: Any) -> None:
        """Write keys and values to the cache, and the attention to ``step.attended``."""
        attn = self._attn
        if attn.kv_cache is not self._cache:
            self._divide(attn.kv_cache)
        keys, values = self._caches
        metadata = context.attn_metadata[attn.layer_name]
        query, key, value = step.heads
        slots = context.slot_mapping[attn.layer_name]
        self._write_cache(key, value, keys, values, slots, attn.isa, *_UNSCALED_KV)
        num_tokens = metadata.num_actual_tokens
        self._kernel(
            query[:num_tokens],
            *(keys, values),
            step.attended_heads[:num_tokens],
            *(metadata.query_start_loc, metadata.seq_lens, self._scale, metadata.causal),
            *(self._alibi_slopes, self._window, metadata.block_table, self._softcap),
            *(metadata.scheduler_metadata, None, metadata.dynamic_causal),
            *_UNSCALED_KV,
        )

    def _divide(self, cache: torch.Tensor) -> None:
        """Find the halves of a new KV cache, like vLLM's ``CPUAttentionBackendImpl``."""
        num_blocks, num_heads, block_size, _ = cache.size()
        halves = cache.view(num_blocks, num_heads, block_size * 2, -1)
        self._cache, self._caches = cache, halves.chunk(2, dim=2)


_silu = torch.ops.aten.silu.out
_mul = torch.ops.aten.mul.out


def _is_supported(layer: Any) -> bool:
    return (
        type(layer) is internals.LlamaDecoderLayer
        and type(layer.self_attn) is internals.LlamaAttention
        and type(layer.mlp) is internals.LlamaMLP
        and type(layer.mlp.act_fn) is internals.SiluAndMul
        and _is_plain_attention(layer.self_attn.attn)
        and _rotates_by_kernel(layer.self_attn.rotary_emb)
        and all(map(_is_plain_norm, (layer.input_layernorm, layer.post_attention_layernorm)))
        and all(map(_is_plain_linear, (layer.self_attn.qkv_proj, layer.self_attn.o_proj)))
        and all(map(_is_plain_linear, (layer.mlp.gate_up_proj, layer.mlp.down_proj)))
    )


def _is_plain_attention(attn: Any) -> bool:
    return (
        type(attn) is internals.Attention
        and type(attn.impl) is internals.CPUAttentionBackendImpl
        and attn.attn_type == "decoder"
        and not attn.kv_cache_dtype.startswith("fp8")
        and attn.kv_sharing_target_layer_name is None
        and attn.head_size == attn.head_size_v
        and attn.impl.sinks is None
    )


def _rotates_by_kernel(rotary: Any) -> bool:
    kernel = internals.RotaryEmbedding.forward_cpu
    return getattr(rotary._forward_method, "__func__", None) is kernel


def _is_plain_norm(norm: Any) -> bool:
    return (
        type(norm) is internals.RMSNorm
        and norm.has_weight
        and norm.variance_size_override is None
        and norm.hidden_size % NORM_ELEMENTS == 0
    )


def _is_plain_linear(linear: Any) -> bool:
    return (
        type(linear).__module__ == "vllm.model_executor.layers.linear"  # not LoRA's
        and type(linear.quant_method) is internals.UnquantizedLinearMethod
        and _packed_weights(linear) is not None
        and linear.tp_size == 1
        and not linear.skip_bias_add
    )


def _packed_weights(linear: Any) -> Any:
    """Return oneDNN's form of the weights; None if another library computes the product."""
    # vLLM keeps it only in the closure of this function.
    compute = linear.cpu_linear
    closure = inspect.getclosurevars(compute).nonlocals if inspect.isfunction(compute) else {}
    return closure.get("handler")
