"""Token classification, against the pipeline of transformers."""

import pytest
import torch
import transformers

from cluster.client import wire
from tests.serve.classifier_kit import (  # noqa: F401
    FAMILIES,
    TEXTS,
    ask,
    one_thread,
    refused,
    running,
    save,
)

pytestmark = [
    # transformers scripts parts of DeBERTa on import, and warns that its heuristic is inexact.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:Tokenizer does not support real words"),
]
STRATEGIES = ("none", "simple", "first", "average", "max")
LONG = " ".join(["Anna Berger lives in Berlin and works for Siemens in Munich,"] * 4)


def piped(saved, texts, strategy):
    """(label, score, start, end) of each entity, from the pipeline."""
    pipeline = transformers.pipeline(
        "token-classification",
        model=saved.network,
        tokenizer=saved.tokenizer,
        aggregation_strategy=strategy,
    )
    name = "entity" if strategy == "none" else "entity_group"
    return [
        [
            (found[name], float(found["score"]), found["start"], found["end"])
            for found in pipeline(text)
        ]
        for text in texts
    ]


def as_tuples(item):
    return [
        (entity["label"], entity["score"], entity["start"], entity["end"])
        for entity in item["entities"]
    ]


@pytest.mark.parametrize("family", FAMILIES)
async def test_entities_are_those_of_the_pipeline(tmp_path, family):
    saved = save(tmp_path, family, "ForTokenClassification", max_tokens=60)
    texts = [text for text in TEXTS if text]
    async with running(saved, "token-classification") as engine:
        for strategy in STRATEGIES:
            body = {"input": texts, "aggregation_strategy": strategy}
            answer = await ask(engine, "/token-classification", body)
            wanted = piped(saved, texts, strategy)
            assert [len(item) for item in wire.entities(answer)] == [len(item) for item in wanted]
            for text, item, entities in zip(texts, answer["data"], wanted, strict=True):
                found = as_tuples(item)
                assert [e[0::2] + e[3:] for e in found] == [e[0::2] + e[3:] for e in entities]
                assert [e[1] for e in found] == pytest.approx([e[1] for e in entities], abs=1e-5)
                assert all(
                    entity["text"] == text[entity["start"] : entity["end"]]
                    for entity in item["entities"]
                )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("ner"), "bert", "ForTokenClassification")


async def test_an_empty_text_has_no_entities(saved):
    async with running(saved, "token-classification") as engine:
        for path in ("/token-classification", "/ner"):
            answer = await ask(engine, path, {"input": ["", "Berlin"]})
            assert answer["data"][0] == {"index": 0, "entities": []}
            assert answer["data"][1]["index"] == 1


async def test_a_long_text_is_refused_cut_or_read_in_windows(tmp_path):
    """A token in two windows has the mean of what both say."""
    saved = save(tmp_path, "bert", "ForTokenClassification", labels={0: "x", 1: "y", 2: "z"})
    async with running(saved, "token-classification") as engine:
        error = await refused(engine, "/ner", {"input": LONG}, 400)
        assert "the model takes 40" in error["message"]
        cut = await entities(engine, {"input": LONG, "truncate": True})
        left = await entities(engine, {"input": LONG, "truncate": "left"})
        body = {"input": ["Berlin", LONG], "stride": 10, "aggregation_strategy": "none"}
        whole = await entities(engine, body)
        largest = await entities(engine, {**body, "aggregate": "max"})
    encoding = saved.tokenizer(LONG, return_offsets_mapping=True, add_special_tokens=False)
    spans = encoding["offset_mapping"]
    assert (cut[0]["start"], cut[-1]["end"]) == (0, spans[37][1])
    assert (left[0]["start"], left[-1]["end"]) == (spans[-38][0], len(LONG))
    merged = merged_by_hand(saved, encoding["input_ids"], stride=10)
    for found, how in ((whole, torch.mean), (largest, torch.amax)):
        scores = torch.stack([how(torch.stack(rows), 0) for rows in merged])
        best = scores.max(-1)
        wanted = [
            (saved.network.config.id2label[label], *span)
            for label, span in zip(best.indices.tolist(), spans, strict=True)
        ]
        assert [(e["label"], e["start"], e["end"]) for e in found] == wanted
        assert [e["score"] for e in found] == pytest.approx(best.values.tolist(), abs=1e-5)


async def entities(engine, body):
    """The entities of the last text."""
    return (await ask(engine, "/ner", body))["data"][-1]["entities"]


def merged_by_hand(saved, ids, stride):
    """For each token, what each window that it is in says."""
    room = 38
    said = [[] for _ in ids]
    for start in range(0, len(ids), room - stride):
        window = ids[start : start + room]
        special = saved.tokenizer.cls_token_id, saved.tokenizer.sep_token_id
        row = torch.tensor([[special[0], *window, special[1]]])
        with torch.inference_mode():
            scores = saved.network(row).logits[0].softmax(-1)
        for index in range(len(window)):
            said[start + index].append(scores[index + 1])
        if start + room >= len(ids):
            return said
    return said
