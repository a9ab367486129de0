"""``/fill-mask``: candidates for each mask of a text, by a masked language model."""

import time
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from cluster.engines.classifier.model.padded import MAX_CANDIDATES
from cluster.engines.classifier.model.types import Rows
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import Task
from cluster.errors import InvalidRequestError

MAX_REPLY_CANDIDATES = 100_000
"""Candidates in a reply, for all masks of all texts; they take about 100 MB."""

TopK = Annotated[int, Meta(ge=1, le=MAX_CANDIDATES)]


class FillMaskRequest(schema.TaskRequest, frozen=True, kw_only=True):
    """Body of ``POST /fill-mask``; the texts contain the model's mask, e.g. ``[MASK]``."""

    input: str | list[str]
    top_k: TopK = 5
    """Number of candidates per mask."""


class Candidate(Struct, frozen=True, gc=False):
    """A token as id and as text, and its probability."""

    token: int
    token_str: str
    score: float


class Filled(Struct, frozen=True):
    """Candidates for each mask of one text, best first."""

    index: int
    masks: list[list[Candidate]]


class FillMaskReply(schema.ListReply[Filled], frozen=True, kw_only=True):
    """Reply of ``POST /fill-mask``."""


class FillMask(Task[FillMaskRequest]):
    """Task ``fill-mask``."""

    name = "fill-mask"
    head = "fill-mask"
    paths = ("/fill-mask",)
    summary = "Find candidates for each mask of one or more texts."
    request = FillMaskRequest
    response = FillMaskReply

    def inputs(self, request: FillMaskRequest) -> list[str]:
        texts = schema.single_texts(request.input, self.config.max_texts)
        mask = self.model.tokenizer.mask_token
        count = request.top_k * sum(text.count(mask) for text in texts if mask)
        if count > MAX_REPLY_CANDIDATES:
            message = (
                f"the masks have {count} candidates; a request may have {MAX_REPLY_CANDIDATES}. "
                "Send fewer masks, or lower `top_k`."
            )
            raise InvalidRequestError(message, param="input")
        return texts

    def reply(self, request: FillMaskRequest, encoded: Encoded) -> FillMaskReply:
        data = [self._filled(index, rows, request.top_k) for index, rows in enumerate(encoded.rows)]
        return FillMaskReply(
            id=request.reply_id("fill-mask"),
            created=int(time.time()),
            data=data,
            model=self.config.name,
            usage=schema.usage(encoded),
        )

    def _filled(self, index: int, rows: Rows, top_k: int) -> Filled:
        tokenizer = self.model.tokenizer
        if not len(rows):
            mask = tokenizer.mask_token
            message = f"input[{index}] has no {mask} among the tokens that the model reads"
            raise InvalidRequestError(message, param="input")
        ids, scores = np.split(rows, 2, axis=1)
        masks = [
            [
                Candidate(int(token), tokenizer.decode(int(token)), score)
                for token, score in zip(row[:top_k].tolist(), values.tolist(), strict=False)
            ]
            for row, values in zip(ids, scores, strict=True)
        ]
        return Filled(index, masks)
