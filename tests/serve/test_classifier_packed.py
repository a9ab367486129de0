"""BERT without padding: layers, layout, int8, and the GPU code with a CPU's attention."""

import asyncio
import copy
import random
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from cluster.config import ClassifierConfig
from cluster.engines.classifier.model.load import load_model
from cluster.engines.classifier.model.outputs import Pooling
from cluster.engines.classifier.model.packed.cpu import PackedBert
from cluster.engines.classifier.model.packed.gpu import (
    MIN_TOKENS,
    SIZE_BITS,
    TOKENS_PER_TEXT,
    Buffers,
    VarlenBert,
    buffer_sizes,
)
from cluster.engines.classifier.model.packed.layout import Layout, round_up
from cluster.engines.classifier.model.packed.linear import (
    Arithmetic,
    PlainLinear,
    PrepackedLinear,
    Weights,
    make_linear,
)
from cluster.engines.classifier.model.packed.network import supports
from cluster.engines.classifier.model.packed.quantize import (
    RangeObserver,
    quantize,
    quantized_arithmetic,
)
from cluster.engines.classifier.model.padded import TransformersModel
from cluster.engines.classifier.serving import service
from tests.serve.classifier_kit import one_thread, serving  # noqa: F401
from tests.serve.test_classifier_pooling import MODES
from tests.serve.word_bert import SIZES, TEXTS, make_bert, make_distilbert, make_roberta, save_model

VOCABULARY = 50
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_attention_heads=2,
        intermediate_size=96,
        num_hidden_layers=3,
        max_position_embeddings=80,
        initializer_range=0.2,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def texts(*lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCABULARY, length) for length in sorted(lengths)]


def layer(inputs, outputs, activation=None):
    torch.manual_seed(4)
    weight, bias = torch.randn(outputs, inputs) * 0.1, torch.randn(outputs)
    return Weights(weight, bias, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "gelu", "relu", "gelu_new"])
def test_prepacked_and_plain_layers_agree(dtype, activation):
    weights = layer(64, 48, activation).to(dtype)
    plain, packed = PlainLinear(weights), PrepackedLinear(weights)
    x, residual = torch.randn(7, 64).to(dtype), torch.randn(7, 48).to(dtype)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(packed(x), plain(x), **close)
    if activation is None:
        torch.testing.assert_close(
            packed.with_residual(x, residual), plain.with_residual(x, residual), **close
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_prepacked_layers_are_used_if_they_agree(dtype, monkeypatch):
    weights = layer(64, 48, "gelu").to(dtype)
    assert isinstance(make_linear("layer", weights), PrepackedLinear)
    monkeypatch.setattr(PrepackedLinear, "__call__", lambda self, x: torch.zeros(len(x), 48))
    assert isinstance(make_linear("layer", weights), PlainLinear)

    def missing(self, weights):
        raise AttributeError("_linear_pointwise")

    monkeypatch.setattr(PrepackedLinear, "__init__", missing)
    assert isinstance(make_linear("layer", weights), PlainLinear)


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=24),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    task=st.sampled_from(["classify", "embed"]),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_results_do_not_depend_on_the_other_texts_of_a_batch(net, lengths, seed, dtype, task, data):
    ids = texts(*lengths, seed=seed)
    model = PackedBert(net, Arithmetic.plain(dtype))
    together = model.run(task, ids)
    index = data.draw(st.integers(0, len(ids) - 1))
    alone = model.run(task, [ids[index]])[0]
    # Weights, and with them rounding errors, are ten times those of a trained network.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    np.testing.assert_allclose(alone, together[index], atol=tolerance)


def test_int8_scores_do_not_depend_on_the_other_texts_of_a_batch(net):
    model, _ = quantized_and_full(net)
    ids = texts(3, 9, 9, 17, 40, 41)
    together = model.run("classify", ids)
    alone = np.concatenate([model.run("classify", [row]) for row in ids])
    np.testing.assert_allclose(alone, together, atol=1e-2)


def quantized_and_full(net):
    observer = RangeObserver()
    full = PackedBert(net, Arithmetic(torch.float32, torch.float32, observer))
    for task in ("classify", "embed"):
        full.run(task, texts(*range(1, 60), seed=7))
    return PackedBert(net, quantized_arithmetic(observer.ranges)), full


def test_int8_is_close_to_float32(net):
    model, full = quantized_and_full(net)
    ids = texts(*range(5, 60), seed=8)
    for task, mean in (("classify", 0.02), ("embed", 0.01)):
        off = np.abs(model.run(task, ids) - full.run(task, ids))
        assert 0 < off.mean() < mean  # zero would mean that nothing was quantized


def test_int8_leaves_the_warning_filters_of_other_threads_alone(net, monkeypatch):
    model, _ = quantized_and_full(net)
    with monkeypatch.context() as patch:
        patch.setattr(warnings, "catch_warnings", None)
        rows = model.run("classify", texts(3, 9))
    assert np.isfinite(rows).all()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantize_rounds_and_saturates():
    x = torch.tensor([[-9.0, -1.0, 0.0, 0.24, 0.26, 99.0]])
    assert quantize(x, 0.5, 4).tolist() == [[0, 2, 4, 4, 5, 202]]
    assert quantize(x, 0.1, 4).tolist()[0][-1] == 255


def test_the_layout_groups_texts_of_similar_length():
    layout = Layout.for_lengths((19, 20, 20, 40), heads=2, mask_dtype=torch.float32)
    found = [(group.texts, group.length, group.keys) for group in layout.groups]
    assert found == [(3, 20, 32), (1, 40, 48)]
    assert layout.padded_pairs == 3 * 20 * 32 + 40 * 48 - (19**2 + 2 * 20**2 + 40**2)
    assert layout.starts.tolist()[:4] == [0, 19, 39, 59]
    assert layout.num_tokens == 99
    gathered = layout.back.tolist()[: 99 * 2]
    assert len(set(gathered)) == len(gathered)


def test_many_batches_have_few_shapes():
    shapes = {"rows": set(), "texts": set(), "products": set()}
    for seed in range(200):
        lengths = sorted(random.Random(seed).choices(range(5, 120), k=20 + seed % 13))
        layout = Layout.for_lengths(lengths, heads=2, mask_dtype=torch.float32)
        shapes["rows"].add(len(layout.positions))
        shapes["texts"].add(len(layout.starts))
        for group in layout.groups:
            parts = group.portions
            shapes["products"] |= {(part.stop - part.start, group.length) for part in parts}
            covered = [row for part in parts for row in range(part.start, part.stop)]
            assert covered == list(range(2 * group.texts))
        assert len(layout.positions) <= 1.04 * sum(lengths) + 3
        assert len(layout.back) == 2 * len(layout.positions)
    # Without rounding and powers of two, the same batches have 186 numbers of rows, 13 numbers of
    # texts and 403 products.
    counts = {kind: len(found) for kind, found in shapes.items()}
    assert counts["rows"] < 186 / 3
    assert counts["texts"] < 13 / 3
    assert counts["products"] < 403 / 4


def test_a_single_text_gets_the_layout_of_its_length():
    one, same, other = (Layout.for_lengths([n], 2, torch.float32) for n in (7, 7, 8))
    assert one is same
    assert (one.num_tokens, other.num_tokens) == (7, 8)
    first, second = texts(7, 7, seed=1)
    for row in (first, second, ~first):
        packed = one.pack([row])
        assert packed.tokens[:7].tolist() == np.maximum(row, ~row).tolist()
        assert packed.tokens[7:].tolist() == [0]
        assert (packed.second is None) == (row[0] >= 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_text_gets_the_same_vector_however_much_it_is_padded(net, dtype):
    model = PackedBert(net, Arithmetic.plain(dtype))
    ids = texts(*[11] * 20, 13, 13, 16, 17, 20, 31, 33, 36, seed=5)
    together = model.run("embed", ids)
    alone = np.concatenate([model.run("embed", [row]) for row in ids])
    np.testing.assert_allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_pooling_ignores_padding(net, mode):
    pooling = Pooling((mode,), normalize=False)
    ids = texts(19, 20, 20, 40)
    packed, padded = PackedBert(net, pooling=pooling), TransformersModel(net, 0, pooling)
    np.testing.assert_allclose(packed.run("embed", ids), padded.run("embed", ids), atol=1e-4)
    assert 1 < packed.padding < 4  # one row, and the pairs of padded keys in attention
    assert padded.padding == 1


def attend_one_by_one(query, key, value, starts_q, starts_k, max_length):
    """Compute variable-length attention text by text; see ``gpu.Attend``."""
    context = torch.zeros_like(query)
    ends = zip(starts_q[1:].tolist(), starts_k[1:].tolist(), strict=True)
    first_q = first_k = 0
    for end_q, end_k in ends:
        q, k, v = query[first_q:end_q], key[first_k:end_k], value[first_k:end_k]
        assert len(k) <= max_length
        if len(q) and len(k):
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            found = functional.scaled_dot_product_attention(q, k, v, scale=1.0)
            context[first_q:end_q] = found.transpose(0, 1)
        first_q, first_k = end_q, end_k
    return context


@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=24), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_varlen_and_grouped_attention_agree(net, lengths, seed):
    ids = texts(*lengths, seed=seed)
    ids[0] = np.where(np.arange(len(ids[0])) > 1, ~ids[0], ids[0])
    arithmetic = Arithmetic.plain(torch.float32)
    pooling = Pooling(tuple(MODES))
    varlen = VarlenBert(net, arithmetic, pooling, attend_one_by_one, graphs=False)
    grouped = PackedBert(net, arithmetic, pooling)
    for batch in (ids, ids[:1], ids):  # buffers keep nothing of the previous batch
        for task in ("classify", "embed"):
            found, wanted = varlen.run(task, batch), grouped.run(task, batch)
            np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_copies_compute_concurrently_in_separate_buffers(net):
    arithmetic = Arithmetic.plain(torch.float32)
    first = VarlenBert(net, arithmetic, Pooling(), attend_one_by_one, graphs=False)
    second, found = copy.copy(first), {}
    models = enumerate((first, second))
    loads = {model: [texts(*range(3, 30), seed=seed)] * 20 for seed, model in models}

    def work(model):
        found[model] = [model.run("classify", batch) for batch in loads[model]]

    threads = [threading.Thread(target=work, args=(model,)) for model in loads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, batches in loads.items():
        wanted = PackedBert(net, arithmetic).run("classify", batches[0])
        for rows in found[model]:
            np.testing.assert_allclose(rows, wanted, atol=1e-5)


@given(lengths=st.lists(st.integers(4, 40), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_the_prepared_buffers_are_those_that_batches_use(lengths):
    used = sum(lengths)
    size = round_up(max(MIN_TOKENS, used, len(lengths) * TOKENS_PER_TEXT), SIZE_BITS)
    assert size in buffer_sizes(used)
    assert buffer_sizes(used)[-1] == size
    assert len(buffer_sizes(16_384)) == 4 * 8 + 1  # from 64 to 16,384 tokens


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), longest=st.integers(50, 90))
@settings(max_examples=50, deadline=None)
def test_the_rest_of_the_buffers_becomes_texts_of_allowed_length(lengths, longest):
    size = round_up(max(MIN_TOKENS, sum(lengths), len(lengths) * TOKENS_PER_TEXT), SIZE_BITS)
    buffers = Buffers(size, torch.device("cpu"), longest)
    buffers.fill(texts(*lengths))
    found = np.diff(buffers.host["starts"].numpy())
    assert found[: len(lengths)].tolist() == sorted(lengths)
    assert found.min() >= 0
    assert found.max() <= longest
    assert found.sum() == size


async def test_a_gpu_engine_prepares_a_batch_while_another_is_computed(tmp_path, monkeypatch):
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    path = save_model(tmp_path / "model", make_bert())
    config = ClassifierConfig(name="a", model="a", dtype="float32", max_batch_tokens=64)

    filled, overlaps, fill = [], threading.Event(), Buffers.fill

    def fill_and_record(buffers, ids):
        fill(buffers, ids)
        filled.append(buffers)
        if len(filled) == 2:
            overlaps.set()

    def attend(*args):
        assert overlaps.wait(30)  # compute the first batch after the second is laid out
        return attend_one_by_one(*args)

    def load(*args):
        loaded = load_model(*args)
        net = BertForSequenceClassification.from_pretrained(path).eval()
        arithmetic = Arithmetic.plain(torch.float32)
        model = VarlenBert(net, arithmetic, Pooling(), attend, graphs=False)
        return replace(loaded, model=model, shares_cores=False)

    monkeypatch.setattr(Buffers, "fill", fill_and_record)
    monkeypatch.setattr(service, "load_model", load)
    async with serving(config, path) as engine:
        encode = engine.service.encode
        answers = await asyncio.gather(*(encode("classify", [TEXTS[0]] * 40) for _ in range(4)))
        assert overlaps.is_set()
        alone = await encode("classify", [TEXTS[0]])
    for answer in answers:
        np.testing.assert_allclose(answer.rows, np.tile(alone.rows, (40, 1)), atol=1e-5)


def test_second_segments_have_the_other_token_type(net):
    plain, marked = texts(12)[0], texts(12)[0].copy()
    marked[5:] = ~marked[5:]
    found = PackedBert(net).run("classify", [marked])
    types = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        logits = net(input_ids=torch.from_numpy(plain)[None], token_type_ids=types).logits
    np.testing.assert_allclose(found, logits.softmax(-1), atol=1e-5)


RAGGED = st.lists(st.integers(1, 40), min_size=1, max_size=20).map(sorted)


@given(lengths=RAGGED, seed=st.integers(0, 99), task=st.sampled_from(["classify", "embed"]))
@settings(max_examples=50, deadline=None)
def test_packed_and_padded_agree(word_network, lengths, seed, task):
    random = np.random.default_rng(seed)
    ids = [random.integers(0, SIZES["vocab_size"], length) for length in lengths]
    packed = PackedBert(word_network).run(task, ids)
    padded = TransformersModel(word_network, pad_id=0).run(task, ids)
    np.testing.assert_allclose(packed, padded, atol=1e-5)


def test_packing_supports_only_plain_bert(word_network):
    assert supports(word_network)
    assert supports(word_network.base_model)
    assert not supports(make_roberta())
    assert not supports(make_distilbert())
