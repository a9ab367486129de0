"""Sentiment: of texts through a classifier, of aspects through a generator."""

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from cluster.applications.json_output import response_format
from cluster.applications.tasks.base import Run
from cluster.tasks import SentimentRequest, SentimentResult
from cluster.tasks.results import LabelScore, TextSentiment

ASPECT_LABELS = ("positive", "negative", "neutral", "absent")
_TOKENS_PER_ASPECT = 32
_TEXTS_PER_CALL = 128


async def sentiment(request: SentimentRequest, run: Run) -> AsyncGenerator[SentimentResult, None]:
    """Find the sentiments of texts, in order."""
    model = run.classifier(request.model)
    # Before any call is charged.
    generator = run.generator(request.generator, "generator") if request.aspects else ""
    texts = request.texts
    batches = [texts[i : i + _TEXTS_PER_CALL] for i in range(0, len(texts), _TEXTS_PER_CALL)]

    async def label(batch: list[str]) -> list[dict[str, Any]]:
        # Long texts are read in windows.
        body = {"model": model, "input": batch, "stride": 0}
        answer = await run.calls.post("/classify", body)
        return sorted(answer["data"], key=lambda row: row["index"])

    async def find_aspects(text: str) -> dict[str, str]:
        return await _find_aspects(request.aspects, run, generator, text)

    rows = [row for rows in await run.calls.map(label, batches) for row in rows]
    aspects: list[dict[str, str]] = [{} for _ in texts]
    if request.aspects:
        aspects = await run.calls.map(find_aspects, texts)
    yield SentimentResult(
        **run.result_fields("sentiment", model),
        results=[
            TextSentiment(
                label=row["label"],
                score=row["score"],
                scores=[LabelScore(label=s["label"], score=s["score"]) for s in row["scores"]],
                aspects=found,
            )
            for row, found in zip(rows, aspects, strict=True)
        ],
    )


async def _find_aspects(
    aspects: Sequence[str], run: Run, generator: str, text: str
) -> dict[str, str]:
    names = list(dict.fromkeys(aspects))
    choices = {"type": "string", "enum": list(ASPECT_LABELS)}
    schema = {
        "type": "object",
        "properties": dict.fromkeys(names, choices),
        "required": names,
        "additionalProperties": False,
    }
    values = {"text": text, "aspects": ", ".join(names)}
    done = await run.calls.chat(
        run.prompts["aspects"].messages(values),
        generator,
        max_tokens=_TOKENS_PER_ASPECT * len(names) + sum(map(len, names)),
        temperature=0,
        response_format=response_format("aspects", schema),
    )
    try:
        found = json.loads(done.text)
    except (ValueError, RecursionError):
        found = {}
    # The schema guides the engine; a cut answer, or an engine without guidance, may differ.
    found = found if isinstance(found, dict) else {}
    return {name: found[name] if found.get(name) in ASPECT_LABELS else "absent" for name in names}
