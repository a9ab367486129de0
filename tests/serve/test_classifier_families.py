"""Every model family with every head, against transformers one text at a time."""

import asyncio

import numpy as np
import pytest
import torch
from transformers import BertForNextSentencePrediction

from cluster.client import wire
from tests.serve.classifier_kit import (  # noqa: F401
    FAMILIES,
    LABELS,
    PAIRS,
    TEXTS,
    ask,
    one_thread,
    refused,
    running,
    save,
)

# transformers scripts parts of DeBERTa when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@pytest.mark.parametrize("family", FAMILIES)
async def test_labels_and_vectors_of_texts_and_pairs(tmp_path, family):
    saved = save(tmp_path, family, max_tokens=60)
    async with running(saved, "classify", "embed") as engine:
        given = [*TEXTS, *map(list, PAIRS)]
        answer = await ask(engine, "/classify", {"input": given})
        vectors = await ask(engine, "/v1/embeddings", {"input": TEXTS})
    wanted = [saved.logits(text) for text in TEXTS] + [saved.logits(*pair) for pair in PAIRS]
    for item, logits in zip(answer["data"], wanted, strict=True):
        by_label = {score["label"]: score["score"] for score in item["scores"]}
        scores = logits.softmax(-1).tolist()
        assert [by_label[name] for name in LABELS.values()] == pytest.approx(scores, abs=1e-5)
    for item, text in zip(vectors["data"], TEXTS, strict=True):
        mean = torch.nn.functional.normalize(saved.hidden(text).mean(0), dim=0)
        assert item["embedding"] == pytest.approx(mean.tolist(), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
async def test_masks_are_filled_as_by_transformers(tmp_path, family):
    saved = save(tmp_path, family, "ForMaskedLM")
    mask = saved.tokenizer.mask_token
    texts = [f"the {mask} film", f"Anna {mask} lives in {mask} and works", mask, f"a {mask}"]
    async with running(saved, "fill-mask", "embed") as engine:
        answer = await ask(engine, "/fill-mask", {"input": texts, "top_k": 7})
        vector = (await ask(engine, "/v1/embeddings", {"input": texts[0]}))["data"][0]["embedding"]
    for text, item in zip(texts, answer["data"], strict=True):
        ids = torch.tensor(saved.tokenizer(text)["input_ids"])
        scores = saved.logits(text)[ids == saved.tokenizer.mask_token_id].softmax(-1)
        best = scores.topk(7)
        assert len(item["masks"]) == text.count(mask)
        for found, values, tokens in zip(
            item["masks"], *map(torch.Tensor.tolist, best), strict=True
        ):
            assert [candidate["token"] for candidate in found] == tokens
            assert [candidate["score"] for candidate in found] == pytest.approx(values, abs=1e-5)
            assert [candidate["token_str"] for candidate in found] == [
                saved.tokenizer.decode([token]) for token in tokens
            ]
    assert [len(item) for item in wire.candidates(answer)] == [text.count(mask) for text in texts]
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
async def test_threads_with_a_shared_network_do_not_interfere(tmp_path, family):
    saved = save(tmp_path, family, "ForMaskedLM")
    texts = [f"the {saved.tokenizer.mask_token}" + " good" * (index % 5) for index in range(80)]
    async with running(saved, "fill-mask", "embed", threads=3, max_batch_tokens=512) as engine:
        encode = engine.service.encode
        alone = {
            task: [(await encode(task, [text])).rows[0] for text in texts[:5]]
            for task in ("fill-mask", "embed")
        }
        tasks = [*alone] * 6
        for task, found in zip(
            tasks, await asyncio.gather(*(encode(task, texts) for task in tasks)), strict=True
        ):
            for index, rows in enumerate(found.rows):
                np.testing.assert_allclose(rows, alone[task][index % 5], atol=1e-5)


async def test_the_next_sentence(tmp_path):
    saved = save(tmp_path, "bert", "ForNextSentencePrediction")
    assert isinstance(saved.network, BertForNextSentencePrediction)
    async with running(saved, "next-sentence") as engine:
        answer = await ask(engine, "/next-sentence", {"input": [list(pair) for pair in PAIRS]})
        named = {"text": PAIRS[0][0], "text_pair": PAIRS[0][1]}
        one = await ask(engine, "/next-sentence", {"input": named})
    wanted = [saved.logits(*pair).softmax(-1)[0].item() for pair in PAIRS]
    assert [item["score"] for item in answer["data"]] == pytest.approx(wanted, abs=1e-5)
    assert [item["is_next"] for item in answer["data"]] == [score >= 0.5 for score in wanted]
    assert one["data"][0]["score"] == pytest.approx(wanted[0], abs=1e-5)


async def test_next_sentence_needs_pairs(tmp_path):
    saved = save(tmp_path, "bert", "ForNextSentencePrediction")
    async with running(saved, "next-sentence") as engine:
        error = await refused(engine, "/next-sentence", {"input": [["a", "b"], "a"]}, 400)
        assert error["message"].startswith("input[1] is one text")


async def test_fill_mask_names_the_text_without_a_mask(tmp_path):
    saved = save(tmp_path, "bert", "ForMaskedLM")
    async with running(saved, "fill-mask") as engine:
        for text, options in (("good", {}), ("good " * 50 + "[MASK]", {"truncate": True})):
            error = await refused(engine, "/fill-mask", {"input": ["[MASK]", text], **options}, 400)
            assert error["message"].startswith("input[1] has no [MASK] among")
        for top_k in (0, 101):
            error = await refused(engine, "/fill-mask", {"input": "[MASK]", "top_k": top_k}, 400)
            assert error["param"] == "top_k"


async def test_the_candidates_of_a_reply_are_limited(tmp_path):
    saved = save(tmp_path, "bert", "ForMaskedLM")
    async with running(saved, "fill-mask") as engine:
        masks = ["[MASK] " * 30] * 50  # 1,500
        body = {"input": masks, "top_k": 67}
        error = await refused(engine, "/fill-mask", body, 400)
        assert error["message"].startswith("the masks have 100500 candidates; a request may have")
        assert len((await ask(engine, "/fill-mask", {**body, "top_k": 1}))["data"]) == 50
        # Each candidate of Hugging Face's format repeats its text.
        error = await refused(engine, "/pipeline/fill-mask", {"inputs": masks[:7]}, 400)
        assert error["message"].startswith("the reply has 1050 filled texts; the limit is 1000")
        assert len(await ask(engine, "/pipeline/fill-mask", {"inputs": masks[:6]})) == 6
