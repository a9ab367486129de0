"""Extraction of data by the user's JSON schema, with the positions of the values in the text."""

import asyncio
import json
from collections.abc import AsyncGenerator
from itertools import islice
from typing import Any

from cluster.applications.json_output import (
    check_schema,
    leaves,
    parse_output,
    response_format,
)
from cluster.applications.positions import Finder
from cluster.applications.tasks.base import Run
from cluster.tasks import ExtractRequest, ExtractResult
from cluster.tasks.results import Span

MAX_VALUES = 1000
"""Values of one answer that are located; the others get no position."""


async def extract(request: ExtractRequest, run: Run) -> AsyncGenerator[ExtractResult, None]:
    """Extract data from a text."""
    schema = request.json_schema
    await asyncio.to_thread(check_schema, schema)
    model = run.generator(request.model)
    examples = [
        ({"text": one.input}, json.dumps(one.output, ensure_ascii=False))
        for one in request.examples
    ]
    values = {"text": request.text, "instructions": request.instructions}
    done = await run.calls.chat(
        run.prompts["extract"].messages(values, examples),
        model,
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        response_format=response_format("data", schema),
    )
    is_cut = done.finish_reason == "length"
    data = await asyncio.to_thread(parse_output, done.text, schema, is_cut=is_cut)
    spans, not_found = await asyncio.to_thread(_locate, data, request.text)
    yield ExtractResult(
        **run.result_fields("extract", model), data=data, spans=spans, not_found=not_found
    )


def _locate(data: dict[str, Any], text: str) -> tuple[list[Span], list[str]]:
    finder = Finder(text)
    spans, not_found = [], []
    for path, texts in islice(leaves(data), MAX_VALUES):
        if (place := next(filter(None, map(finder.find, texts)), None)) is None:
            not_found.append(path)
        else:
            spans.append(Span(path=path, start=place[0], end=place[1]))
    return spans, not_found
