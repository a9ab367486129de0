"""The filter for top-p keeps the tokens that vLLM's keeps."""

from typing import Any

import pytest

from tests.cluster.test_vllm_kernels import random_tensor

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

NUM_TOKENS = 20_000
PEAKED, FLAT, VERY_FLAT = 8.0, 1.5, 0.2  # need 256 candidates, 2,048, and all tokens


def filtered(logits: Any, k: list[int] | None, p: list[float]) -> tuple[Any, Any]:
    """Return our logits and vLLM's."""
    import torch
    from vllm.v1.sample.ops import topk_topp_sampler

    from cluster.engines.vllm.top_p import apply_top_k_top_p

    ks = None if k is None else torch.tensor(k, dtype=torch.int32)
    arguments = ks, torch.tensor(p)
    ours = apply_top_k_top_p(logits.clone(), *arguments)
    return ours, topk_topp_sampler.apply_top_k_top_p_pytorch(logits.clone(), *arguments)


def assert_same(ours: Any, theirs: Any) -> None:
    """At most one token per row differs: its sum of probabilities may round to either side."""
    for row, other in zip(ours, theirs, strict=True):
        kept, expected = row.isfinite(), other.isfinite()
        assert (kept ^ expected).sum() <= 1
        both = kept & expected
        assert both.any()
        assert row[both].equal(other[both])


@pytest.mark.parametrize("scale", [PEAKED, FLAT, VERY_FLAT])
@pytest.mark.parametrize("k", [None, [50, 3, NUM_TOKENS, 400]])
def test_it_keeps_what_vllm_keeps(scale: float, k: list[int] | None) -> None:
    logits = random_tensor(4, NUM_TOKENS, dtype="float32") * scale
    assert_same(*filtered(logits, k, [0.9, 0.5, 0.95, 0.1]))


def test_rows_differ() -> None:
    import torch

    rows = random_tensor(4, NUM_TOKENS, dtype="float32")
    logits = rows * torch.tensor([[PEAKED], [VERY_FLAT], [FLAT], [PEAKED]])
    ours, theirs = filtered(logits, None, [0.9, 0.9, 0.9, 1.0])
    assert_same(ours[:3], theirs[:3])
    assert ours[3].equal(logits[3])


def test_equal_logits() -> None:
    logits = random_tensor(4, NUM_TOKENS).float().round() * 4
    for row, other in zip(*filtered(logits, None, [0.9, 0.5, 0.95, 0.1]), strict=True):
        kept, expected = row[row.isfinite()], other[other.isfinite()]
        assert kept.min() == expected.min()
        assert abs(len(kept) - len(expected)) <= 1


@pytest.mark.parametrize("p", [1e-9, 0.999])
def test_one_token_is_always_left(p: float) -> None:
    logits = random_tensor(2, NUM_TOKENS, dtype="float32") * 100
    assert_same(*filtered(logits, None, [p, p]))


def test_a_small_vocabulary() -> None:
    assert_same(*filtered(random_tensor(2, 50, dtype="float32"), [5, 50], [0.9, 0.5]))
