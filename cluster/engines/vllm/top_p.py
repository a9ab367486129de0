"""Top-p filter for CPUs that sorts the likely tokens instead of the whole vocabulary.

vLLM sorts all logits of each sequence in each step, which takes 3 ms for a vocabulary of 49,152.
The tokens that remain are almost always among a few hundred.
"""

from typing import Any

import torch

from cluster.engines.vllm import internals

_NUM_CANDIDATES = 256, 2048
"""Most likely tokens to sort; more only in rows for which these have too little probability."""


def apply_top_k_top_p(
    logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None
) -> torch.Tensor:
    """Return logits [rows, tokens], with -inf for tokens that top-k or top-p exclude.

    Replaces vLLM's function of the same name, and may also write to ``logits``. It keeps the same
    tokens, except that it may choose others among tokens with the same logit at the limit.
    """
    sampler: Any = internals.topk_topp_sampler
    if p is None or logits.shape[1] <= _NUM_CANDIDATES[-1]:
        kept: torch.Tensor = sampler.apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=True)
        return kept
    if k is not None:
        logits = sampler.apply_top_k_only(logits, k)
    rows = (p < 1).nonzero().flatten()  # vLLM has 1 for requests without top-p
    for num_candidates in _NUM_CANDIDATES:
        if not len(rows):
            return logits
        has_all = len(rows) == len(p)
        chosen, limits = (logits, p) if has_all else (logits[rows], p[rows])
        kept, is_complete = _keep_likely(chosen, limits, num_candidates)
        if has_all and is_complete.all():  # the common case, without copies
            return kept
        logits[rows[is_complete]] = kept[is_complete]
        rows = rows[~is_complete]
    if len(rows):
        logits[rows] = sampler.apply_top_k_top_p_pytorch(logits[rows], None, p[rows])
    return logits


def _keep_likely(
    logits: torch.Tensor, p: torch.Tensor, num_candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return filtered logits, and the rows whose candidates have a probability of ``p``."""
    values, ids = logits.topk(num_candidates, dim=1)
    probabilities = (values - logits.logsumexp(dim=1, keepdim=True)).exp_()
    sums = probabilities.cumsum(1)
    excluded = sums - probabilities >= p.unsqueeze(1)
    excluded[:, 0] = False
    values.masked_fill_(excluded, -torch.inf)
    kept = torch.full_like(logits, -torch.inf).scatter_(1, ids, values)
    return kept, sums[:, -1] >= p
