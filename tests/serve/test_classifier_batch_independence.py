"""Scores of the default classifier do not depend on the other texts of a batch."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cluster.engines.classifier.model.check_texts import check_texts
from cluster.engines.classifier.model.packed.cpu import PackedBert
from cluster.engines.classifier.model.packed.linear import Arithmetic
from cluster.engines.classifier.model.padded import TransformersModel
from cluster.engines.classifier.model.tokenizer import TextTokenizer
from cluster.models.build import build
from cluster.models.store import resolve
from tests.serve.classifier_kit import (  # noqa: F401
    FAMILIES,
    MAX_TOKENS,
    one_thread,
    save,
)

MODEL = "sentiment-minilm"
NEAR = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
MOST = 512
"""Length of the model's longest text."""
BATCH = 600
"""Tokens of a batch; smaller than in a server, to save time."""
EDGES = (1, 2, 15, 16, 17, 31, 32, 33, MOST - 1, MOST)
"""Shortest and longest text, and lengths around the registers that softmax fills."""


@cache
def path() -> str:
    build([MODEL])
    return resolve(MODEL)


@cache
def model(dtype: torch.dtype) -> PackedBert:
    network = AutoModelForSequenceClassification.from_pretrained(path()).eval()
    return PackedBert(network, Arithmetic.plain(dtype))


@cache
def words() -> np.ndarray:
    """Return the tokens of some thousand words."""
    tokenizer = TextTokenizer(AutoTokenizer.from_pretrained(path()), MOST)
    rows = tokenizer.encode(check_texts(path()), 0, "right")
    return np.concatenate([row[1:-1] for row in rows])


def text(length: int, start: int) -> np.ndarray:
    """Return words between special tokens, if there is room for these."""
    row = words()[start : start + length].copy()
    if length > 2:
        row[0], row[-1] = 101, 102
    return row


LENGTHS = st.one_of(
    st.lists(st.sampled_from(EDGES) | st.integers(1, MOST), min_size=1, max_size=4),
    st.lists(st.integers(1, 40), min_size=2, max_size=24),
)


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@given(lengths=LENGTHS, seed=st.integers(0, 999))
@example(lengths=[1, MOST], seed=0)
@settings(max_examples=12, deadline=None)
def test_scores_do_not_depend_on_the_other_texts_of_a_batch(dtype, lengths, seed):
    lengths = np.sort(np.array(lengths)[np.cumsum(lengths) <= BATCH])
    starts = np.random.default_rng(seed).integers(0, len(words()) - MOST, len(lengths))
    ids = [text(*each) for each in zip(lengths, starts, strict=True)]
    together = model(dtype).run("classify", ids)
    alone = np.concatenate([model(dtype).run("classify", [row]) for row in ids])
    np.testing.assert_allclose(alone, together, rtol=0, atol=NEAR[dtype])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # DeBERTa's, as imported
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_models_of_every_family_are_batch_independent(tmp_path, family, dtype):
    saved = save(tmp_path, family)
    network = saved.network.to(dtype)
    model = TransformersModel(network, saved.tokenizer.pad_token_id)
    random = np.random.default_rng(0)
    for _ in range(5):
        lengths = sorted(random.integers(1, MAX_TOKENS + 1, 20))
        ids = [random.integers(5, len(saved.tokenizer), length) for length in lengths]
        for task in ("classify", "embed"):
            together = model.run(task, ids)
            alone = np.concatenate([model.run(task, [row]) for row in ids])
            np.testing.assert_allclose(alone, together, rtol=0, atol=NEAR[dtype])
