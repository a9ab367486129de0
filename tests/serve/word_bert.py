"""Tiny random models whose tokens are whole words, and transformers' results for them."""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

WORDS = ["good", "bad", "film", "the", "a", "plot", "dull", "fine", "was", "not"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
MAX_TOKENS = 32
SIZES = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.5,
}


LABELS = {"id2label": {0: "negative", 1: "neutral", 2: "positive"}}
LABELS["label2id"] = {label: i for i, label in LABELS["id2label"].items()}


def make_word_tokenizer():
    vocab = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=MAX_TOKENS,
    )


def save_model(path, network):
    network.eval().save_pretrained(path)
    make_word_tokenizer().save_pretrained(path)
    return str(path)


def make_bert(**changes):
    torch.manual_seed(1)
    config = BertConfig(**SIZES, max_position_embeddings=40, pad_token_id=0, **LABELS, **changes)
    return BertForSequenceClassification(config)


def make_distilbert():
    sizes = {"vocab_size": 14, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    return DistilBertForSequenceClassification(
        DistilBertConfig(**sizes, max_position_embeddings=40, initializer_range=0.5, **LABELS)
    )


def make_roberta():
    return RobertaForSequenceClassification(
        RobertaConfig(**SIZES, max_position_embeddings=31, pad_token_id=0, **LABELS)
    )


def expected(network, texts):
    """Return transformers' scores and mean-pooled unit vectors, one text at a time."""
    tokenizer = make_word_tokenizer()
    scores, vectors = [], []
    with torch.inference_mode():
        for text in texts:
            inputs = tokenizer(text, return_tensors="pt", truncation=True)
            inputs.pop("token_type_ids", None)
            scores.append(network(**inputs).logits.softmax(-1)[0])
            hidden = network.base_model(**inputs).last_hidden_state[0]
            vectors.append(torch.nn.functional.normalize(hidden.mean(0), dim=0))
    return torch.stack(scores).numpy(), torch.stack(vectors).numpy()


TEXTS = ["good film", "", "the plot was dull", "unknown words", "a " * 20, "good\x00\x07 film", "é"]
