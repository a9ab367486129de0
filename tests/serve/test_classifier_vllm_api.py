"""Fields and formats of vLLM's pooling API, on classifiers."""

import asyncio
import base64
import json

import numpy as np
import pytest
import torch

from tests.serve.classifier_kit import (  # noqa: F401
    ask,
    one_thread,
    post,
    refused,
    running,
    save,
)

TEXTS = ["good film", "the plot went on", "a dull one"]
LONG = "good film and the plot went on " * 20
VIEWS = {
    "float32": (torch.float32, np.uint32),
    "float16": (torch.float16, np.uint16),
    "bfloat16": (torch.bfloat16, np.uint16),
    "fp8_e4m3": (torch.float8_e4m3fn, np.uint8),
    "fp8_e5m2": (torch.float8_e5m2, np.uint8),
}


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return save(tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("cross"), labels={0: "relevant"})


@pytest.fixture
async def engine(labels):
    async with running(labels, "classify", "embed") as engine:
        yield engine


@pytest.fixture
async def ranker(cross_encoder):
    async with running(cross_encoder, "score", "rerank") as engine:
        yield engine


def vectors_of(answer):
    return np.array([item["embedding"] for item in answer["data"]], np.float32)


def decode(content, dtype, endianness, width):
    """Return the values of a body as numbers of float32."""
    kind, view = VIEWS[dtype]
    order = ">" if endianness == "big" else "<"
    raw = np.frombuffer(content, np.dtype(view).newbyteorder(order)).astype(view)
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[raw.itemsize]
    signed = torch.from_numpy(raw.view(np.uint8 if raw.itemsize == 1 else f"i{raw.itemsize}"))
    return signed.view(same_size).view(kind).float().numpy().reshape(-1, width)


def as_dtype(rows, dtype):
    return torch.from_numpy(rows).to(VIEWS[dtype][0]).float().numpy()


@pytest.mark.parametrize("dtype", VIEWS)
@pytest.mark.parametrize("endianness", ["native", "big", "little"])
@pytest.mark.parametrize("format", ["base64", "bytes", "bytes_only"])
async def test_binary_formats_equal_the_numbers_exactly(engine, format, endianness, dtype):
    plain = vectors_of(await ask(engine, "/v1/embeddings", {"input": TEXTS}))
    body = {
        "input": TEXTS,
        "encoding_format": format,
        "embed_dtype": dtype,
        "endianness": endianness,
    }
    answer = await post(engine, "/v1/embeddings", body)
    assert answer.status_code == 200
    if format == "base64":
        content = b"".join(base64.b64decode(item["embedding"]) for item in answer.json()["data"])
    else:
        content = answer.content
        assert answer.headers["content-type"] == "application/octet-stream"
    found = decode(content, dtype, endianness, plain.shape[1])
    np.testing.assert_array_equal(found, as_dtype(plain, dtype))
    assert ("metadata" in answer.headers) == (format == "bytes")
    if format == "bytes":
        metadata = json.loads(answer.headers["metadata"])
        assert metadata["model"] == "tiny"
        assert metadata["usage"]["prompt_tokens"] > 0
        assert [item["shape"] for item in metadata["data"]] == [[plain.shape[1]]] * 3
        for item, row in zip(metadata["data"], found, strict=True):
            part = decode(content[item["start"] : item["end"]], dtype, endianness, len(row))
            np.testing.assert_array_equal(part[0], row)


async def test_bytes_of_many_texts_are_refused_because_of_the_header(engine):
    body = {"input": ["good"] * 65, "encoding_format": "bytes"}
    assert "bytes_only" in (await refused(engine, "/v1/embeddings", body, 400))["message"]
    body["encoding_format"] = "bytes_only"
    assert len((await post(engine, "/v1/embeddings", body)).content) == 65 * 16 * 4


@pytest.mark.parametrize("limit", [-1, 3, 8, 40])
@pytest.mark.parametrize("side", ["left", "right", None])
async def test_prompts_are_cut_to_truncate_prompt_tokens(engine, labels, limit, side):
    body = {"input": LONG, "truncate_prompt_tokens": limit, "truncation_side": side}
    answer = await ask(engine, "/v1/embeddings", body)
    length = 40 if limit == -1 else limit
    assert answer["usage"]["prompt_tokens"] == length
    ids = labels.tokenizer(LONG, add_special_tokens=False)["input_ids"]
    kept = ids[-(length - 2) :] if side == "left" else ids[: length - 2]
    whole = [labels.tokenizer.cls_token_id, *kept, labels.tokenizer.sep_token_id]
    same = await ask(engine, "/v1/embeddings", {"input": whole})
    np.testing.assert_allclose(vectors_of(answer), vectors_of(same), atol=1e-6)
    classified = await ask(engine, "/classify", body)
    assert classified["data"][0]["probs"] == pytest.approx(
        (await ask(engine, "/classify", {"input": [whole]}))["data"][0]["probs"], abs=1e-6
    )


@pytest.mark.parametrize("path", ["/v1/embeddings", "/classify", "/pooling"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 41}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 1}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": "3"}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"add_special_tokens": 1}, "add_special_tokens"),
        ({"use_activation": "yes"}, "use_activation"),
        ({"padding": "longest"}, "padding"),
        ({"request_id": 3}, "request_id"),
        ({"priority": "high"}, "priority"),
        ({"chat_template": "{{ 1 }}", "messages": [{"role": "user", "content": "a"}]}, None),
        ({"input": "", "add_special_tokens": False}, "input"),
    ],
)
async def test_bad_values_are_400_and_name_the_field(engine, path, fields, param):
    body = {"input": "good film and the plot", **fields}
    if "messages" in fields:
        del body["input"]
        param = "chat_template"
    assert (await refused(engine, path, body, 400))["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"embed_dtype": "int8"}, "embed_dtype"),
        ({"endianness": "middle"}, "endianness"),
        ({"dimensions": 17}, "dimensions"),
        ({"modality": "image"}, "modality"),
    ],
)
async def test_bad_vector_formats_are_400(engine, fields, param):
    error = await refused(engine, "/v1/embeddings", {"input": "good", **fields}, 400)
    assert error["param"] == param


async def test_fields_without_effect_are_accepted(engine):
    plain = await ask(engine, "/classify", {"input": TEXTS})
    fields = {
        "user": "u",
        "priority": 3,
        "cache_salt": "s",
        "padding": "max_length",
        "mm_processor_kwargs": {},
        "add_special_tokens": True,
        "use_activation": True,
        "request_id": "mine",
    }
    answer = await ask(engine, "/classify", {"input": TEXTS, **fields})
    assert answer["data"] == plain["data"]
    assert answer["id"] == "classify-mine"


async def test_unknown_fields_are_ignored_with_a_warning(engine):
    for path in ("/classify", "/v1/embeddings", "/pooling", "/tokenize"):
        text = {"prompt" if path == "/tokenize" else "input": "good"}
        answer = await post(engine, path, {**text, "colour": 1, "top_kk": 2})
        assert answer.status_code == 200
        assert answer.headers["x-tandem-warning"] == "ignored unknown fields: colour, top_kk"
        assert "x-tandem-warning" not in (await post(engine, path, text)).headers


async def test_a_warning_is_bounded_and_printable(engine):
    names = {f"\u00e9\r\nname {index:02}" + "x" * 100_000: 1 for index in range(30)}
    warning = (await post(engine, "/classify", {"input": "a", **names})).headers["x-tandem-warning"]
    assert len(warning) < 700
    assert warning.isprintable()
    assert warning.isascii()
    assert warning.endswith("and 20 more")


async def test_replies_have_vllms_fields(engine, labels):
    for path, prefix in (("/classify", "classify-"), ("/v1/embeddings", "embd-")):
        answer = await ask(engine, path, {"input": TEXTS})
        assert answer["id"].startswith(prefix)
        assert answer["object"] == "list"
        assert answer["created"] > 1_700_000_000
        assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"]
    item = (await ask(engine, "/classify", {"input": "good film", "top_k": 1}))["data"][0]
    expected = labels.logits("good film").softmax(-1).tolist()
    assert item["probs"] == pytest.approx(expected, abs=1e-5)
    assert item["num_classes"] == 3
    assert item["label"] == ["negative", "neutral", "positive"][int(np.argmax(expected))]


@pytest.mark.parametrize("name", ["use_activation", "activation", "softmax"])
async def test_without_activation_scores_are_logits(engine, labels, name):
    answer = await ask(engine, "/classify", {"input": "good film", name: False})
    logits = labels.logits("good film").tolist()
    assert answer["data"][0]["probs"] == pytest.approx(logits, abs=1e-5)


async def test_without_activation_vectors_are_not_normalized(engine, labels):
    mean = labels.hidden("good film").mean(0).numpy()
    for fields in ({"use_activation": False}, {"normalize": False}):
        answer = await ask(engine, "/v1/embeddings", {"input": "good film", **fields})
        np.testing.assert_allclose(vectors_of(answer)[0], mean, atol=1e-5)


async def test_token_ids_are_classified_as_they_are(engine, labels):
    rows = [labels.tokenizer(text)["input_ids"] for text in TEXTS]
    texts = await ask(engine, "/classify", {"input": TEXTS})
    ids = await ask(engine, "/classify", {"input": rows})
    single = await ask(engine, "/classify", {"input": rows[0]})
    for item, wanted in zip(
        [*ids["data"], *single["data"]], [*texts["data"], texts["data"][0]], strict=True
    ):
        assert item["probs"] == pytest.approx(wanted["probs"], abs=1e-6)


async def test_special_tokens_can_be_left_out(engine, labels):
    bare = labels.tokenizer("good film", add_special_tokens=False)["input_ids"]
    body = {"input": "good film", "add_special_tokens": False}
    answer = await ask(engine, "/classify", body)
    assert answer["usage"]["prompt_tokens"] == len(bare)
    same = await ask(engine, "/classify", {"input": bare})
    assert answer["data"][0]["probs"] == pytest.approx(same["data"][0]["probs"], abs=1e-6)


async def test_messages_are_joined_or_follow_the_models_template(labels, tmp_path):
    turns = [{"role": "user", "content": [{"type": "text", "text": "good"}]}]
    turns.append({"role": "assistant", "content": "film"})
    async with running(labels, "classify", "embed") as engine:
        for path in ("/classify", "/v1/embeddings", "/pooling"):
            answer = await ask(engine, path, {"messages": turns})
            plain = await ask(engine, path, {"input": "good\nfilm"})
            assert answer["data"] == plain["data"]
        batch = await ask(engine, "/v1/embeddings", {"messages": [turns, turns[:1]]})
        nested = await ask(engine, "/v1/embeddings", {"input": [turns, turns[:1]]})
        assert batch["data"] == nested["data"]
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        error = await refused(engine, "/classify", {"messages": image}, 400)
        assert error["param"] == "messages"
    saved = save(tmp_path)
    saved.tokenizer.chat_template = (
        "{% for m in messages %}[CLS]{{ m.content }}{{ end }}{% endfor %}"
    )
    saved.tokenizer.save_pretrained(tmp_path)
    async with running(saved, "classify") as engine:
        body = {"messages": turns, "chat_template_kwargs": {"end": "[SEP]"}}
        answer = await ask(engine, "/classify", body)
        text = {"input": "[CLS]good[SEP][CLS]film[SEP]", "add_special_tokens": False}
        assert answer["data"] == (await ask(engine, "/classify", text))["data"]
        body["chat_template_kwargs"]["chat_template"] = "{{ 1 }}"  # of the client
        for path in ("/classify", "/tokenize"):
            assert (await refused(engine, path, body, 400))["param"] == "chat_template"


async def test_conversations_are_counted_before_they_are_read(labels):
    async with running(labels, "classify", max_texts=2) as engine:
        turns = [{"role": "user", "content": "good"}]
        image = [{"role": "user", "content": [{"type": "image_url"}]}]
        error = await refused(engine, "/classify", {"messages": [image, turns, turns]}, 400)
        assert error["message"] == "messages has 3 texts; a request may have 2"
        for mixed in ([turns, turns[0]], [turns[0], turns], [[]]):
            error = await refused(engine, "/classify", {"messages": mixed}, 400)
            assert error["param"] == "messages"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": "a" * 500_001}, "prompt"),
        ("/tokenize", {"inputs": ["a" * 250_000, "a" * 250_001]}, "inputs"),
        ("/detokenize", {"tokens": [5] * 125_001}, "tokens"),
        ("/decode", {"ids": [[5] * 125_000, [5]]}, "ids"),
    ],
)
async def test_the_tokenizer_takes_no_endless_inputs(engine, path, body, param):
    error = await refused(engine, path, body, 400)
    assert error["param"] == param
    assert "a request may have" in error["message"]


async def test_tokenizing_a_long_text_does_not_block_other_requests(engine):
    body = {"prompt": "good film " * 50_000}
    num_turns = []
    for _ in range(5):  # the machine may be busy
        task = asyncio.create_task(ask(engine, "/tokenize", body))
        num_turns.append(0)
        while not task.done():
            await asyncio.sleep(0.001)
            num_turns[-1] += 1
        assert (await task)["count"] >= 100_000
        if num_turns[-1] > 30:  # about 10 if the tokenizer holds the GIL
            return
    pytest.fail(f"the event loop turned {num_turns} times")


async def test_scores_take_all_names_and_content_parts(ranker):
    plain = await ask(ranker, "/score", {"text_1": "good", "text_2": ["film", "plot"]})
    part = {"content": [{"type": "text", "text": "good"}]}
    for first, second in (("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
        answer = await ask(ranker, "/v1/score", {first: part, second: ["film", "plot"]})
        assert answer["data"] == plain["data"]
    raw = {"text_1": "good", "text_2": ["film", "plot"], "use_activation": False}
    for item, wanted in zip((await ask(ranker, "/score", raw))["data"], plain["data"], strict=True):
        assert 1 / (1 + np.exp(-item["score"])) == pytest.approx(wanted["score"], abs=1e-5)


async def test_rerank_takes_vllms_fields(ranker):
    body = {"query": "good", "documents": "the film", "top_n": 0, "max_tokens_per_doc": 0}
    answer = await ask(ranker, "/v2/rerank", body)
    assert len(answer["results"]) == 1
    assert answer["id"].startswith("rerank-")
    limited = {"query": "film the", "documents": ["the film"], "max_tokens_per_query": 1}
    same = {"query": "film", "documents": ["the film"]}
    results = [(await ask(ranker, "/rerank", fields))["results"] for fields in (limited, same)]
    assert results[0] == results[1]


async def test_pooling_returns_plain_results(engine, labels):
    probs = await ask(engine, "/pooling", {"input": TEXTS})
    assert probs["id"].startswith("pooling-")
    assert probs["data"][0]["object"] == "pooling"
    wanted = labels.logits(TEXTS[0]).softmax(-1).tolist()
    assert probs["data"][0]["data"] == pytest.approx(wanted, abs=1e-5)
    vectors = await ask(engine, "/pooling", {"input": TEXTS, "task": "embed"})
    embeddings = await ask(engine, "/v1/embeddings", {"input": TEXTS})
    assert [item["data"] for item in vectors["data"]] == [
        item["embedding"] for item in embeddings["data"]
    ]
    body = {"input": TEXTS, "task": "token_embed", "use_activation": False}
    tokens = await ask(engine, "/pooling", body)
    for text, item in zip(TEXTS, tokens["data"], strict=True):
        np.testing.assert_allclose(item["data"], labels.hidden(text), atol=1e-5)
    raw = await post(engine, "/pooling", {**body, "encoding_format": "bytes"})
    shapes = [item["shape"] for item in json.loads(raw.headers["metadata"])["data"]]
    assert shapes == [list(np.shape(item["data"])) for item in tokens["data"]]
    assert (await refused(engine, "/pooling", {"input": "a", "dimensions": 4}, 400))["param"]
    assert (await refused(engine, "/pooling", {"input": "a", "task": "token_classify"}, 400))[
        "param"
    ] == "task"


async def test_tokenize_and_detokenize(engine, labels):
    body = {"prompt": "good film", "return_token_strs": True}
    answer = await ask(engine, "/tokenize", body)
    ids = labels.tokenizer("good film")["input_ids"]
    assert answer == {
        "count": len(ids),
        "max_model_len": 40,
        "tokens": ids,
        "token_strs": labels.tokenizer.convert_ids_to_tokens(ids),
    }
    bare = await ask(engine, "/tokenize", {"prompt": "good film", "add_special_tokens": False})
    assert bare["tokens"] == ids[1:-1]
    assert bare["token_strs"] is None
    chat = await ask(engine, "/tokenize", {"messages": [{"role": "user", "content": "good film"}]})
    assert chat["tokens"] == ids
    text = await ask(engine, "/detokenize", {"tokens": ids[1:-1]})
    assert text == {"prompt": labels.tokenizer.decode(ids[1:-1])}
    assert (await refused(engine, "/tokenize", {}, 400))["param"] == "prompt"
    assert (await refused(engine, "/tokenize", {"prompt": 3}, 400))["param"] == "prompt"
    assert (await refused(engine, "/detokenize", {"tokens": [-1]}, 400))["param"] == "tokens[0]"
