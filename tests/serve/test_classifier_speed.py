import asyncio
import copy
import json
import random
import threading
import warnings
from dataclasses import replace
from queue import SimpleQueue

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from cluster.config import ClassifierConfig
from cluster.engines.classifier.model import agreement, build
from cluster.engines.classifier.model.agreement import (
    Agreement,
    AgreementStore,
    batches_by_length,
    measure_agreement,
    require_agreement,
)
from cluster.engines.classifier.model.check_texts import FILE, check_texts
from cluster.engines.classifier.model.device import share_threads
from cluster.engines.classifier.model.load import load_model
from cluster.engines.classifier.model.outputs import Pooling
from cluster.engines.classifier.model.packed.cpu import PackedBert
from cluster.engines.classifier.model.packed.gpu import Buffers, VarlenBert
from cluster.engines.classifier.model.packed.layout import Layout
from cluster.engines.classifier.model.packed.linear import (
    Arithmetic,
    PlainLinear,
    PrepackedLinear,
    Weights,
    make_linear,
)
from cluster.engines.classifier.model.packed.quantize import (
    RangeObserver,
    observed_arithmetic,
    quantize,
    quantized_arithmetic,
)
from cluster.engines.classifier.model.padded import TransformersModel
from cluster.engines.classifier.serving import service
from cluster.engines.classifier.serving.jobs import Job
from cluster.engines.classifier.serving.queue import JobQueue
from cluster.engines.classifier.serving.runner import MAX_STREAMS
from cluster.engines.classifier.serving.tasks import TASKS
from cluster.errors import ConfigError
from tests.serve.classifier_kit import (  # noqa: F401, the fixture is used by all tests here
    TEXTS,
    one_thread,
    running,
    save,
)
from tests.serve.test_classifier import bert, save_model
from tests.serve.test_classifier import running as running_config
from tests.serve.test_classifier_pooling import MODES

VOCABULARY = 50
DTYPES = (torch.float32, torch.bfloat16)


def network(**changes):
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96, **changes}
    config = BertConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=3,
        max_position_embeddings=80,
        initializer_range=0.2,
        num_labels=3,
        **sizes,
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def net():
    return network()


def texts(*lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCABULARY, length) for length in sorted(lengths)]


def layer(inputs, outputs, activation=None):
    torch.manual_seed(4)
    weight, bias = torch.randn(outputs, inputs) * 0.1, torch.randn(outputs)
    return Weights(weight, bias, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "gelu", "relu", "gelu_new"])
def test_prepacked_layers_compute_what_plain_ones_do(dtype, activation):
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
def test_prepacked_layers_are_taken_where_they_are_right(dtype, monkeypatch):
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
def test_a_text_alone_has_the_numbers_it_has_in_company(net, lengths, seed, dtype, task, data):
    ids = texts(*lengths, seed=seed)
    model = PackedBert(net, Arithmetic.plain(dtype))
    together = model.run(task, ids)
    index = data.draw(st.integers(0, len(ids) - 1))
    alone = model.run(task, [ids[index]])[0]
    # This network's weights are ten times those of a trained one, and so is its rounding.
    near = 1e-5 if dtype == torch.float32 else 1e-2
    np.testing.assert_allclose(alone, together[index], atol=near)


def test_scores_in_8_bits_do_not_depend_on_company(net):
    model, _ = in_8_bits(net)
    ids = texts(3, 9, 9, 17, 40, 41)
    together = model.run("classify", ids)
    alone = np.concatenate([model.run("classify", [row]) for row in ids])
    np.testing.assert_allclose(alone, together, atol=1e-2)


def in_8_bits(net):
    observer = RangeObserver()
    full = PackedBert(net, observed_arithmetic(observer))
    for task in ("classify", "embed"):
        full.run(task, texts(*range(1, 60), seed=7))
    return PackedBert(net, quantized_arithmetic(observer.ranges)), full


def test_8_bits_are_near_to_float32(net):
    model, full = in_8_bits(net)
    ids = texts(*range(5, 60), seed=8)
    for task, mean in (("classify", 0.02), ("embed", 0.01)):
        off = np.abs(model.run(task, ids) - full.run(task, ids))
        assert 0 < off.mean() < mean  # zero would mean that nothing was quantized_arithmetic


def test_computing_in_8_bits_does_not_touch_the_warnings_of_other_threads(net, monkeypatch):
    model, _ = in_8_bits(net)
    with monkeypatch.context() as patch:
        patch.setattr(warnings, "catch_warnings", None)
        rows = model.run("classify", texts(3, 9))
    assert np.isfinite(rows).all()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_eight_bits_round_and_saturate():
    x = torch.tensor([[-9.0, -1.0, 0.0, 0.24, 0.26, 99.0]])
    assert quantize(x, 0.5, 4).tolist() == [[0, 2, 4, 4, 5, 202]]
    assert quantize(x, 0.1, 4).tolist()[0][-1] == 255


def test_the_layout_groups_texts_of_like_length():
    layout = Layout.for_batch(texts(19, 20, 20, 40), heads=2, mask_dtype=torch.float32)
    assert [(group.texts, group.length) for group in layout.groups] == [(3, 20), (1, 40)]
    assert layout.padded_pairs == 20**2 - 19**2
    assert layout.packed.starts.tolist()[:4] == [0, 19, 39, 59]
    assert layout.num_tokens == 99
    gathered = layout.back.tolist()[: 99 * 2]
    assert len(set(gathered)) == len(gathered)


def test_the_shapes_of_many_batches_are_few():
    shapes = {"rows": set(), "slots": set(), "products": set()}
    for seed in range(200):
        lengths = sorted(random.Random(seed).choices(range(5, 120), k=20 + seed % 13))
        layout = Layout.for_batch(texts(*lengths), heads=2, mask_dtype=torch.float32)
        shapes["rows"].add(len(layout.packed.tokens))
        shapes["slots"].add(len(layout.packed.starts))
        for group in layout.groups:
            parts = group.portions
            shapes["products"] |= {(part.stop - part.start, group.length) for part in parts}
            covered = [row for part in parts for row in range(part.start, part.stop)]
            assert covered == list(range(2 * group.texts))
        assert len(layout.packed.tokens) <= 1.04 * sum(lengths) + 3
        assert len(layout.back) == 2 * len(layout.packed.tokens)
    counts = {kind: len(found) for kind, found in shapes.items()}
    assert counts["rows"] < 60
    assert counts["slots"] < 10
    assert counts["products"] < 100


def test_texts_of_less_than_a_register_are_padded_among_themselves(net):
    layout = Layout.for_batch(texts(9, 12, 13, 16), heads=2, mask_dtype=torch.bfloat16)
    assert [(group.texts, group.length) for group in layout.groups] == [(2, 12), (2, 16)]
    model = PackedBert(net, Arithmetic.plain(torch.bfloat16))
    ids = texts(*[11] * 200, 13, seed=5)
    together = model.run("embed", ids)
    alone = np.concatenate([model.run("embed", [row]) for row in ids])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("mode", MODES)
def test_texts_that_attention_pads_are_pooled_without_padding(net, mode):
    pooling = Pooling((mode,), normalize=False)
    ids = texts(19, 20, 20, 40)
    packed, padded = PackedBert(net, pooling=pooling), TransformersModel(net, 0, pooling)
    np.testing.assert_allclose(packed.run("embed", ids), padded.run("embed", ids), atol=1e-4)
    assert 1 < packed.padding < 2  # a row, and the pairs of one
    assert padded.padding == 1


def attend_one_by_one(query, key, value, starts_q, starts_k, most):
    """What flash attention of variable length computes."""
    context = torch.zeros_like(query)
    ends = zip(starts_q[1:].tolist(), starts_k[1:].tolist(), strict=True)
    first_q = first_k = 0
    for end_q, end_k in ends:
        q, k, v = query[first_q:end_q], key[first_k:end_k], value[first_k:end_k]
        assert len(k) <= most
        if len(q) and len(k):
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            found = functional.scaled_dot_product_attention(q, k, v, scale=1.0)
            context[first_q:end_q] = found.transpose(0, 1)
        first_q, first_k = end_q, end_k
    return context


@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=24), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_slots_of_variable_length_give_what_groups_give(net, lengths, seed):
    ids = texts(*lengths, seed=seed)
    ids[0] = np.where(np.arange(len(ids[0])) > 1, ~ids[0], ids[0])
    how = Arithmetic.plain(torch.float32)
    pooling = Pooling(tuple(MODES))
    slots = VarlenBert(net, how, pooling, attend_one_by_one, graphs=False)
    groups = PackedBert(net, how, pooling)
    for batch in (ids, ids[:1], ids):  # a slot holds nothing of the batch before
        for task in ("classify", "embed"):
            found, wanted = slots.run(task, batch), groups.run(task, batch)
            np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_copies_compute_at_the_same_time_each_in_slots_of_its_own(net):
    how = Arithmetic.plain(torch.float32)
    first = VarlenBert(net, how, Pooling(), attend_one_by_one, graphs=False)
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
    for model, batches_ in loads.items():
        wanted = PackedBert(net, how).run("classify", batches_[0])
        for rows in found[model]:
            np.testing.assert_allclose(rows, wanted, atol=1e-5)


async def test_an_engine_on_a_gpu_prepares_beside_what_it_computes(tmp_path, monkeypatch):
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    path = save_model(tmp_path / "model", bert())
    config = ClassifierConfig(name="a", model="a", dtype="float32", max_batch_tokens=64)

    filled, overlaps, fill = [], threading.Event(), Buffers.fill

    def note(slot, ids):
        fill(slot, ids)
        filled.append(slot)
        if len(filled) == 2:
            overlaps.set()

    def attend(*args):
        assert overlaps.wait(30)  # the first batch is not computed before the second is laid out
        return attend_one_by_one(*args)

    def load(*args):
        loaded = load_model(*args)
        net = BertForSequenceClassification.from_pretrained(path).eval()
        how = Arithmetic.plain(torch.float32)
        model = VarlenBert(net, how, Pooling(), attend, graphs=False)
        return replace(loaded, model=model, shares_cores=False)

    monkeypatch.setattr(Buffers, "fill", note)
    monkeypatch.setattr(service, "load_model", load)
    async with running_config(config, path) as engine:
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


def test_agreement_counts_labels_and_cosines():
    scores = np.eye(4, dtype=np.float32)

    def full(task, ids):
        return scores[: len(ids)]

    def low(task, ids):
        rows = scores[: len(ids)].copy()
        rows[-1] = rows[-1][::-1]
        return rows

    ids = texts(3, 4, 5, 6)
    assert measure_agreement("classify", low, full, ids) == Agreement(0.75, 4)
    assert measure_agreement("embed", low, full, ids) == Agreement(0.75, 4)
    assert measure_agreement("classify", full, full, ids).share == 1.0


def test_agreement_compares_each_token_and_the_best_token_of_each_mask():
    ids = texts(2, 2)
    tokens = [np.eye(3, dtype=np.float32)[row] for row in ([0, 1, 2], [2])]
    other = [tokens[0], tokens[0][:1]]
    same = measure_agreement("token-classification", lambda *_: other, lambda *_: tokens, ids)
    assert same == Agreement(0.75, 4)
    masks = [np.array([[7, 3, 0.9, 0.1]]), np.array([[5, 3, 0.6, 0.4]])]
    swapped = [masks[0], np.array([[3, 5, 0.5, 0.5]])]
    assert measure_agreement("fill-mask", lambda *_: swapped, lambda *_: masks, ids) == Agreement(
        0.5, 2
    )


def test_agreement_of_several_labels_is_that_of_all_of_them():
    wanted = np.array([[0.9, 0.6, 0.1], [0.9, 0.6, 0.1], [0.3, 0.2, 0.1]], np.float32)
    found = np.array([[0.7, 0.51, 0.4], [0.9, 0.49, 0.1], [0.2, 0.3, 0.1]], np.float32)
    ids = texts(2, 3, 4)
    several = "multi_label_classification"
    same = measure_agreement("classify", lambda *_: found, lambda *_: wanted, ids, several)
    assert same == Agreement(2 / 3, 3)


@pytest.mark.parametrize("width", [1, 2])
def test_agreement_of_numbers_is_nearness_by_their_spread_over_all_texts(width):
    ids = texts(*range(2, 35))  # one more than a batch
    numbers = {len(row): np.full(width, len(row) / 10, np.float32) for row in ids}

    def full(task, some):
        return np.stack([numbers[len(row)] for row in some])

    def low(task, some):
        rows = full(task, some) + 0.01
        return rows + [[0.1 * (len(row) == 20)] * width for row in some]

    assert measure_agreement("classify", low, full, ids, "regression") == Agreement(32 / 33, 33)


@pytest.mark.parametrize("name", TASKS)
def test_what_is_measured_is_what_the_tasks_ask_for(name):
    pool = ClassifierConfig(name="one", model="one", tasks=(name,))
    assert build.computed_heads(pool) == (TASKS[name].head,)


@pytest.mark.parametrize(
    ("tasks", "head", "labels"),
    [
        (("token-classification", "embed"), "ForTokenClassification", {0: "O", 1: "B-PER"}),
        (("fill-mask", "embed"), "ForMaskedLM", {0: "O"}),
        (("next-sentence",), "ForNextSentencePrediction", {0: "next", 1: "not"}),
        (("score", "rerank"), "ForSequenceClassification", {0: "relevance"}),
    ],
)
async def test_every_head_is_measured_before_it_computes_in_bfloat16(
    tmp_path, monkeypatch, tasks, head, labels
):
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(agreement, "MIN_AGREEMENT", 0)  # a random network's answers are close
    model = save(tmp_path / "model", head=head, labels=labels)
    (tmp_path / "model" / FILE).write_text("".join(f'{{"text": "{t}"}}\n' for t in TEXTS))
    async with running(model, *tasks, dtype="bfloat16") as engine:
        assert 0 < engine.counts().agreement <= 1


def test_too_little_agreement_is_refused():
    pool = ClassifierConfig(name="mood", model="mood", dtype="int8")
    require_agreement(pool, Agreement(0.995, 400), "int8")
    with pytest.raises(ConfigError, match=r"mood\.dtype: int8 agrees .* 99\.00% of 400 .* 99\.5%"):
        require_agreement(pool, Agreement(0.99, 400), "int8")


def test_agreement_is_kept_until_the_model_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    kept = AgreementStore(str(model), "bfloat16")
    assert kept.read() is None
    kept.write(Agreement(0.999, 400))
    assert AgreementStore(str(model), "bfloat16").read() == Agreement(0.999, 400)
    assert AgreementStore(str(model), "int8").read() is None
    (model / "model.safetensors").write_bytes(b"other weights")
    assert AgreementStore(str(model), "bfloat16").read() is None


def test_the_model_brings_its_own_texts_or_has_ours(tmp_path):
    ours = check_texts(str(tmp_path))
    assert ours == check_texts(str(tmp_path))
    lengths = [len(text.split()) for text in ours]
    assert len(set(ours)) > 350
    assert min(lengths) < 8
    assert max(lengths) > 80
    lines = [json.dumps({"text": text}) for text in ("one", "two")]
    (tmp_path / FILE).write_text("\n".join(lines) + "\n")
    assert check_texts(str(tmp_path)) == ["one", "two"]


def test_batches_ascend():
    made = batches_by_length(texts(*range(1, 71)))
    assert [len(batch) for batch in made] == [32, 32, 6]
    assert [len(row) for batch in made for row in batch] == list(range(1, 71))


def put(queue, *lengths):
    job = Job("classify", [], None, asyncio.get_running_loop().create_future(), 0.0)
    job.ids = texts(*lengths)
    queue.put_job(job)


async def test_a_batch_is_cut_for_each_thread_and_small_ones_wait():
    queue = JobQueue(max_batch_tokens=1024, max_queued_tokens=100_000)
    queue.set_streams(2)

    put(queue, *[10] * 60)
    first, second = queue.take_batch(), queue.take_batch()
    assert [turn.batch.num_tokens for turn in (first, second)] == [300, 300]
    assert not first.uses_all_cores
    put(queue, *[10] * 5)
    taken = []
    thread = threading.Thread(target=lambda: taken.append(queue.take_batch()))
    thread.start()
    queue.finish_batch()
    assert not taken  # 50 tokens wait for the one that still runs
    queue.finish_batch()
    thread.join()
    assert taken[0].uses_all_cores
    assert taken[0].batch.num_tokens == 50
    queue.finish_batch()
    put(queue, *[64] * 100)
    assert queue.take_batch().batch.num_tokens == 1024


async def test_beside_a_batch_on_a_gpu_only_a_full_one_is_prepared():
    queue = JobQueue(max_batch_tokens=1024, max_queued_tokens=100_000)
    queue.set_streams(2, one_at_a_time=True)
    taken = SimpleQueue()
    thread = threading.Thread(target=lambda: taken.put(queue.take_batch(is_leader=False)))
    thread.start()

    put(queue, *[10] * 60)
    assert queue.take_batch().batch.num_tokens == 600
    put(queue, *[10] * 100)
    assert taken.empty()
    put(queue, *[10] * 10)
    turn = await asyncio.to_thread(taken.get, timeout=30)
    assert turn.batch.num_tokens == 1020
    thread.join()


async def test_a_batch_that_leaves_enough_for_another_wakes_the_next_thread():
    queue = JobQueue(max_batch_tokens=1024, max_queued_tokens=100_000)
    queue.set_streams(3)
    taken = SimpleQueue()
    threads = [
        threading.Thread(target=lambda leads=leads: taken.put(queue.take_batch(leads)))
        for leads in (True, False, False)
    ]
    for thread in threads:
        thread.start()
    put(queue, *[10] * 90)
    turns = [await asyncio.to_thread(taken.get, timeout=30) for _ in threads]
    assert sorted(turn.batch.num_tokens for turn in turns) == [300, 300, 300]
    assert not any(turn.uses_all_cores for turn in turns)


@given(num_threads=st.integers(1, 300), num_streams=st.integers(1, MAX_STREAMS))
def test_no_thread_is_left_over_or_given_twice(num_threads, num_streams):
    shares = share_threads(num_threads, min(num_threads, num_streams))
    assert sum(shares) == num_threads
    assert min(shares) >= 1
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("threads", [3, 6])
async def test_threads_that_share_the_work_answer_everyone_once(tmp_path, monkeypatch, threads):
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    path = save_model(tmp_path / "model", bert())
    config = ClassifierConfig(name="a", model="a", dtype="float32", threads=threads)
    async with running_config(config, path) as engine:
        service = engine.service
        lists = [[f"good {'film ' * (i % 20)}"] * (1 + i % 40) for i in range(60)]
        answers = await asyncio.gather(*(service.encode("classify", texts) for texts in lists))
        alone = await service.encode("classify", [one[0] for one in lists])
        counts = engine.counts()
    for answer, rows, row in zip(answers, lists, alone.rows, strict=True):
        assert len(answer.rows) == len(rows)
        np.testing.assert_allclose(answer.rows, np.tile(row, (len(rows), 1)), atol=1e-5)
    assert counts.texts == sum(map(len, lists)) + len(lists)
    assert 0 <= counts.padding < 0.5 * counts.tokens
