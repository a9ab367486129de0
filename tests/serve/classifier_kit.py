"""Tiny random models of every family with their tokenizers, and engines of them."""

import asyncio
import contextlib

import httpx
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from cluster.config import ClassifierConfig
from cluster.engines.classifier.engine import ClassifierEngine

MAX_TOKENS = 40
WORDS = """
the good film was not a dull one and plot went on Anna Berger lives in Berlin works for Siemens
Munich wonderful picture un forgettable moving seen Paris how many people live about million
""".split()  # noqa: SIM905
LETTERS = sorted({*"".join(WORDS), *"\u00e9!?,.:;-"})
TEXTS = [
    "good film",
    "",
    "Anna Berger lives in Berlin",
    "the plot, unforgettably moving, was seen in Paris!",
    "a dull one \u00e9\U0001f600 and on",
]
PAIRS = [
    ("good film", "the plot went on"),
    ("", "Berlin"),
    ("how many people live in Berlin?", ""),
    ("Anna Berger lives in Berlin and works for Siemens", "in Munich"),
]
LABELS = {0: "negative", 1: "neutral", 2: "positive"}
ENTITIES = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}


# Vocabularies are explicit, because the trainers of tokenizers are not deterministic.
def _wordpiece():
    halves = [word[len(word) // 2 :] for word in WORDS if len(word) > 4]
    pieces = [*LETTERS, *WORDS[::2], *(f"##{piece}" for piece in (*LETTERS, *halves))]
    tokens = dict.fromkeys((*BERT_SPECIAL, *pieces))
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend, BERT_STYLE


def _byte_level(special, style):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*special, *letters))}
    merges = []
    for word in WORDS[::3]:
        joined = word[0]
        for letter in word[1:]:
            if joined + letter not in vocab:
                merges.append((joined, letter))
                vocab[joined + letter] = len(vocab)
            joined += letter
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend, style


def _unigram(special, style):
    words = [f"\u2581{word}" for word in WORDS[::2]]
    scores = dict.fromkeys(("\u2581", *LETTERS), -9.0) | dict.fromkeys(words, -4.0)
    vocab = [(token, 0.0) for token in special]
    vocab += [(piece, score - index / 1000) for index, (piece, score) in enumerate(scores.items())]
    backend = Tokenizer(models.Unigram(vocab, special.index(style["unk_token"])))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return backend, style


BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BERT_STYLE = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
    "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
}
ROBERTA_STYLE = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "mask_token": "<mask>",
}


def make_tokenizer(make, max_tokens=MAX_TOKENS):
    backend, style = make()
    cls, sep = style["cls_token"], style["sep_token"]
    ids = [(token, backend.token_to_id(token)) for token in (cls, sep)]
    roberta = cls == "<s>"
    pair = f"{cls} $A {sep} {sep} $B {sep}" if roberta else f"{cls} $A {sep} $B:1 {sep}:1"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=pair, special_tokens=ids
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_tokens, **style)


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.5,
    "max_position_embeddings": 64,
}
_DISTIL = {
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
    "initializer_range": 0.5,
    "max_position_embeddings": 64,
}
_DEBERTA = {
    **SIZES,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
}
FAMILIES = {
    "bert": (transformers.BertConfig, SIZES, _wordpiece),
    "distilbert": (
        transformers.DistilBertConfig,
        _DISTIL,
        _wordpiece,
    ),
    "electra": (transformers.ElectraConfig, {**SIZES, "embedding_size": 8}, _wordpiece),
    "roberta": (
        transformers.RobertaConfig,
        SIZES,
        lambda: _byte_level(ROBERTA_SPECIAL, ROBERTA_STYLE),
    ),
    "modernbert": (
        transformers.ModernBertConfig,
        {**SIZES, "num_hidden_layers": 4, "local_attention": 8},
        lambda: _byte_level(BERT_SPECIAL, BERT_STYLE),
    ),
    "xlm-roberta": (
        transformers.XLMRobertaConfig,
        SIZES,
        lambda: _unigram(ROBERTA_SPECIAL, ROBERTA_STYLE),
    ),
    "deberta-v2": (
        transformers.DebertaV2Config,
        _DEBERTA,
        lambda: _unigram(BERT_SPECIAL, BERT_STYLE),
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Use one thread in each module that imports this fixture.

    Tiny models gain nothing from more threads, and slow down if other processes use the cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Saved:
    """Model on disk and in memory."""

    def __init__(self, path, network, tokenizer):
        self.directory = path
        self.path = str(path)
        self.network = network
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def logits(self, *texts, **options):
        """Return the logits of one text or pair, computed alone and without padding."""
        inputs = self._inputs(*texts, **options)
        return self.network(**inputs).logits[0].float()

    @torch.inference_mode()
    def hidden(self, text):
        return self.network.base_model(**self._inputs(text)).last_hidden_state[0].float()

    def windows(self, *texts, stride):
        """Return (start, end, logits) of each window of the last text, cut by transformers."""
        encodings = self.tokenizer(
            *texts,
            truncation="only_second" if len(texts) == 2 else True,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        found = []
        for index in range(len(encodings["input_ids"])):
            names = ("input_ids", "token_type_ids")
            inputs = {name: torch.tensor([encodings[name][index]]) for name in names}
            kinds = encodings.sequence_ids(index)
            spans = zip(encodings["offset_mapping"][index], kinds, strict=True)
            inner = [span for span, kind in spans if kind == len(texts) - 1]
            with torch.inference_mode():
                found.append((inner[0][0], inner[-1][1], self.network(**inputs).logits[0]))
        return found

    def _inputs(self, *texts, **options):
        # In a list: outside of one, transformers treats an empty second text as no pair.
        batch = [texts] if len(texts) == 2 else list(texts)
        inputs = self.tokenizer(batch, return_tensors="pt", **options)
        if getattr(self.network.config, "type_vocab_size", 0) < 2:
            inputs.pop("token_type_ids", None)
        return inputs


def save(path, family="bert", head="ForSequenceClassification", max_tokens=MAX_TOKENS, **changes):
    """Make and save a model with fixed weights."""
    logging.disable_progress_bar()
    torch.manual_seed(7)
    config_class, sizes, make = FAMILIES[family]
    tokenizer = make_tokenizer(make, max_tokens)
    names = changes.pop("labels", ENTITIES if head == "ForTokenClassification" else LABELS)
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")
    }
    config = config_class(
        **{**sizes, **special, "vocab_size": len(tokenizer), **changes},
        id2label=names,
        label2id={label: index for index, label in names.items()},
    )
    network = getattr(transformers, f"AutoModel{head}").from_config(config).eval()
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Saved(path, network, tokenizer)


def loaded(path):
    """Return a saved classifier."""
    network = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    return Saved(path, network, transformers.AutoTokenizer.from_pretrained(path))


def config(**changes):
    fields = {"name": "tiny", "model": "tiny", "dtype": "float32", "threads": 1}
    return ClassifierConfig(**{**fields, "max_batch_tokens": 64, **changes})


@contextlib.asynccontextmanager
async def serving(config, path):
    """Run an engine of the model directory ``path``."""
    engine = ClassifierEngine(config, path)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def running(saved, *tasks, **changes):
    """Run an engine of a saved model."""
    return serving(config(tasks=tasks, **changes), saved.path)


def client(engine):
    transport = httpx.ASGITransport(app=engine.app)
    return httpx.AsyncClient(transport=transport, base_url="http://tandem")


async def post(engine, path, body, headers=None):
    async with client(engine) as http:
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        return await http.post(path, headers=headers, **content)


async def ask(engine, path, body, headers=None):
    """Return the reply to a request that must succeed."""
    answer = await post(engine, path, body, headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def refused(engine, path, body, status):
    """Return the error of a request that must fail."""
    answer = await post(engine, path, body)
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
