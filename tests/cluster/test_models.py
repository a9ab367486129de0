"""Default models, built once into the shared cache."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.models.build import build
from cluster.models.store import list_models, resolve

pytestmark = pytest.mark.timeout(900)

GENERATOR, CLASSIFIER = "smollm2-135m-instruct", "sentiment-minilm"


@pytest.fixture(scope="module")
def generator() -> Path:
    build([GENERATOR])
    return Path(resolve(GENERATOR))


@pytest.fixture(scope="module")
def classifier() -> Path:
    build([CLASSIFIER])
    return Path(resolve(CLASSIFIER))


def test_both_models_are_listed_as_built(generator: Path, classifier: Path) -> None:
    rows = {row.name: row for row in list_models()}
    assert rows[GENERATOR].built
    assert rows[CLASSIFIER].built
    assert rows[GENERATOR].size_bytes > 250e6
    assert rows[GENERATOR].facts["parameters"] == 134_515_008


def test_generator_is_an_unquantized_bfloat16_model(generator: Path) -> None:
    config = json.loads((generator / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    dims = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    assert [config[dim] for dim in dims] == [30, 576, 9, 3]
    assert (config["vocab_size"], config["max_position_embeddings"]) == (49152, 8192)


def test_generator_has_chat_template_and_end_token(generator: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(generator)
    assert tokenizer.model_max_length == 8192
    assert GenerationConfig.from_pretrained(generator).eos_token_id == tokenizer.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    chat = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe terse.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_generator_tokenizer_matches_the_original(generator: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(generator)
    assert tokenizer.tokenize("Hello\n\n12 x") == ["Hello", "ĊĊ", "1", "2", "Ġx"]
    for text in ("It 's 1984 , isn 't it ?", "  über 3.5 €\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_generator_answers_a_question(generator: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(generator)
    model = AutoModelForCausalLM.from_pretrained(generator, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0]
    answer = tokens[prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


@pytest.fixture(scope="module")
def loaded(classifier: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    return model, AutoTokenizer.from_pretrained(classifier)


def test_classifier_reaches_the_required_accuracy(classifier: Path) -> None:
    facts = next(row.facts for row in list_models() if row.name == CLASSIFIER)
    assert float(facts["accuracy"]) >= 0.83
    assert int(facts["num_held_out"]) >= 1000


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("An absolute masterpiece, I loved every minute.", "POSITIVE"),
        ("A glowing, funny and moving film with wonderful actors.", "POSITIVE"),
        ("The battery lasts for days and the screen is great.", "POSITIVE"),
        ("A dull, clumsy mess and a complete waste of time.", "NEGATIVE"),
        ("The plot makes no sense and the acting is terrible.", "NEGATIVE"),
        ("It broke after two days and support never answered.", "NEGATIVE"),
    ],
)
def test_classifier_labels_reviews(loaded: tuple[Any, Any], text: str, label: str) -> None:
    import torch

    model, tokenizer = loaded
    assert model.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    with torch.inference_mode():
        probabilities = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
    assert model.config.id2label[int(probabilities.argmax())] == label
    assert probabilities.max() > 0.8


def test_classifier_has_a_model_card_and_a_reference(classifier: Path) -> None:
    card = (classifier / "README.md").read_text()
    assert "| NEGATIVE |" in card
    assert "| frozen_layers | 4 |" in card
    assert (classifier / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")
    assert sum(json.loads((classifier / "reference.json").read_text())["length"]) >= 1000


def test_classifier_tokenizer_has_no_truncation_or_padding(classifier: Path) -> None:
    saved = json.loads((classifier / "tokenizer.json").read_text())
    assert (saved["truncation"], saved["padding"]) == (None, None)


def test_classifier_embeddings_separate_similar_from_other_texts(loaded: tuple[Any, Any]) -> None:
    import torch
    from torch.nn import functional

    model, tokenizer = loaded
    pairs = [
        ("A man is playing a guitar.", "Someone plays an instrument."),
        ("The stock market fell sharply today.", "Shares dropped on Wall Street."),
        ("How do I reset my password?", "I forgot my login credentials."),
        ("The cat sleeps on the sofa.", "A kitten is napping on the couch."),
        ("This film was terrible.", "The movie was awful."),
    ]
    batch = tokenizer([t for pair in pairs for t in pair], padding=True, return_tensors="pt")
    weights = batch["attention_mask"][:, :, None]
    with torch.inference_mode():
        hidden = model.base_model(**batch).last_hidden_state
    means = functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
    cosines = means @ means.T
    similar = [float(cosines[i, i + 1]) for i in range(0, len(means), 2)]
    others = [float(cosines[i, j]) for i in range(len(means)) for j in range(i // 2 * 2)]
    assert min(similar) > 0.5
    assert max(others) < 0.35
