import copy

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from cluster.config import ClassifierConfig, ResourcesConfig
from cluster.engines.classifier.model.device import choose_device, choose_precision
from cluster.engines.classifier.model.outputs import Pooling
from cluster.engines.classifier.model.packed.gpu import VarlenBert
from cluster.engines.classifier.model.packed.linear import Arithmetic
from cluster.engines.classifier.model.padded import TransformersModel

LAYERS, WIDTH, INNER = 6, 384, 1536


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=12
    )
    return BertForSequenceClassification(config).eval().cuda()


def texts(*lengths):
    random = np.random.default_rng(0)
    return [random.integers(0, 30_000, length) for length in sorted(lengths)]


def test_auto_is_bfloat16_on_a_gpu():
    config = ClassifierConfig(name="a", model="a", resources=ResourcesConfig(gpus=1))
    assert choose_device(config).type == "cuda"
    assert choose_precision(config, choose_device(config)) == "bfloat16"


@pytest.mark.parametrize("task", ["classify", "embed"])
@pytest.mark.parametrize("graphs", [False, True])
def test_cuda_graphs_agree_with_transformers(network, task, graphs):
    model = VarlenBert(network, Arithmetic.plain(torch.bfloat16), Pooling(), graphs=graphs)
    padded = TransformersModel(network, 0)
    for ids in (texts(27), texts(*range(3, 60)), texts(512, 3), texts(27), texts(*[9] * 700)):
        np.testing.assert_allclose(model.run(task, ids), padded.run(task, ids), atol=0.02)


@pytest.mark.parametrize("task", ["classify", "embed"])
def test_prepared_graphs_share_memory_and_keep_each_others_results(network, task):
    model = VarlenBert(network, Arithmetic.plain(torch.bfloat16), Pooling())
    model.prepare(["classify", "embed"], 2048)
    second = copy.copy(model)
    batches = [texts(*[length] * count) for length in (5, 60, 500) for count in (1, 4)]
    captured = torch.cuda.memory_allocated()
    wanted = [model.run(task, batch) for batch in batches]
    for found in ([other.run(task, batch) for batch in batches] for other in (model, second)):
        for rows, first in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(rows, first)
    assert torch.cuda.memory_allocated() == captured  # no graph was captured on the request path


def test_scores_do_not_depend_on_the_other_texts_of_a_batch(network):
    model = VarlenBert(network, Arithmetic.plain(torch.bfloat16), Pooling())
    short = texts(27)
    alone = model.run("classify", short)
    together = model.run("classify", [*short, *texts(500)])
    np.testing.assert_allclose(together[:1], alone, atol=1e-3)
