"""Classification by labels without training.

By a generator: a label's score is the log-probability of prompt and label, less that of the same
label for a text without content ("N/A"). That removes the model's preference for frequent labels
(Zhao et al. 2021, "Calibrate Before Use"; Holtzman et al. 2021, "Surface Form Competition"). The
tokens before the label are the same for all labels and vanish in the softmax, so nothing depends on
where the tokenizer puts the boundary.
"""

import math
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any

from cluster.applications.tasks.base import Run
from cluster.client.wire import CHAT
from cluster.errors import InvalidRequestError, UnsupportedError
from cluster.tasks import ClassifyRequest, ClassifyResult
from cluster.tasks.results import LabeledText, LabelScore

NEUTRAL_TEXT = "N/A"
MAX_SCORES = 2048
"""Texts times labels of one request: the calls to a generator."""
TEMPERATURE = 0.1
"""Divisor of cosine similarities before the softmax."""


async def classify(request: ClassifyRequest, run: Run) -> AsyncGenerator[ClassifyResult, None]:
    """Classify texts, in order."""
    labels = request.labels
    if len(set(labels)) < len(labels):
        raise InvalidRequestError("labels: each label may occur once", param="labels")
    if request.method == "encoder":
        model = run.encoder(request.model)
        scores = await _score_by_similarity(request, run, model)
    else:
        model = run.generator(request.model)
        scores = await _score_by_likelihood(request, run, model)
    yield ClassifyResult(
        **run.result_fields("classify", model),
        method=request.method,
        results=[_labeled(labels, softmax(row)) for row in scores],
    )


async def _score_by_likelihood(request: ClassifyRequest, run: Run, model: str) -> list[list[float]]:
    texts = [NEUTRAL_TEXT, *request.texts]
    pairs = [(text, label) for text in texts for label in request.labels]
    if len(pairs) > MAX_SCORES:
        raise InvalidRequestError(
            f"{len(request.texts)} texts and {len(request.labels)} labels need {len(pairs)} calls; "
            f"the limit is {MAX_SCORES}. Send fewer texts at once.",
            param="texts",
        )
    turns = [({"text": one.input}, one.output) for one in request.examples]

    async def score(pair: tuple[str, str]) -> float:
        values = {"text": pair[0], "labels": ", ".join(request.labels)}
        messages = run.prompts["classify"].messages(values, turns)
        return await _log_likelihood(
            run, model, [*messages, {"role": "assistant", "content": pair[1]}]
        )

    scores = await run.calls.map(score, pairs)
    width = len(request.labels)
    rows = [scores[start : start + width] for start in range(0, len(scores), width)]
    return [[a - b for a, b in zip(row, rows[0], strict=True)] for row in rows[1:]]


async def _log_likelihood(run: Run, model: str, messages: Sequence[Mapping[str, str]]) -> float:
    """Return the log-probability of a whole conversation."""
    answer = await run.calls.post(
        CHAT,
        {
            "model": model,
            "messages": messages,
            "add_generation_prompt": False,
            "continue_final_message": True,
            "prompt_logprobs": 0,
            "max_tokens": 1,
            "temperature": 0,
        },
    )
    rows: list[Mapping[str, Any] | None] | None = answer.get("prompt_logprobs")
    if rows is None:
        raise UnsupportedError(
            f"The model `{model}` returns no log-probabilities of prompts; use the method "
            "`encoder`, or another model.",
            param="model",
        )
    # Each position has the prompt's own token; the first one has no probability.
    return math.fsum(next(iter(row.values()))["logprob"] for row in rows if row)


async def _score_by_similarity(request: ClassifyRequest, run: Run, model: str) -> list[list[float]]:
    body = {"model": model, "input": [*request.labels, *request.texts]}
    answer = await run.calls.post("/v1/embeddings", body)
    rows = sorted(answer["data"], key=lambda row: row["index"])
    vectors: list[list[float]] = [row["embedding"] for row in rows]
    num_labels = len(request.labels)
    return [
        [_dot(text, label) / TEMPERATURE for label in vectors[:num_labels]]
        for text in vectors[num_labels:]
    ]


def _dot(first: Iterable[float], second: Iterable[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))


def softmax(scores: Sequence[float]) -> list[float]:
    """Return probabilities in proportion to the exponentials of scores."""
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]


def _labeled(labels: Sequence[str], probabilities: Sequence[float]) -> LabeledText:
    pairs = sorted(zip(labels, probabilities, strict=True), key=lambda pair: -pair[1])
    scores = [LabelScore(label=label, score=round(score, 6)) for label, score in pairs]
    return LabeledText(label=scores[0].label, score=scores[0].score, scores=scores)
