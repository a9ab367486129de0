"""``/fill-mask``: what a masked language model would write in place of each mask."""

from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from cluster.engines.classifier.model.padded import MAX_CANDIDATES
from cluster.engines.classifier.model.types import Rows
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import Listing, Request, Task, usage
from cluster.errors import InvalidRequestError


class FillMaskRequest(Request, frozen=True, kw_only=True):
    """The body of ``POST /fill-mask``; the texts hold the model's own mask (``[MASK]``)."""

    input: str | list[str]
    top_k: Annotated[int, Meta(ge=1, le=MAX_CANDIDATES)] = 5
    """How many candidates to give for each mask."""


class Candidate(Struct, frozen=True, gc=False):
    """A token, as its id and as text, and its probability."""

    token: int
    token_str: str
    score: float


class Filled(Struct, frozen=True):
    """For each mask of one text, in order, its candidates, the best first."""

    index: int
    masks: list[list[Candidate]]


class FillMaskReply(Listing[Filled], frozen=True, kw_only=True):
    """The answer of ``POST /fill-mask``."""


class FillMask(Task[FillMaskRequest]):
    """See the module."""

    name = "fill-mask"
    head = "fill-mask"
    paths = ("/fill-mask",)
    summary = "Candidates for each mask of a text, or of each of a list."
    request = FillMaskRequest
    response = FillMaskReply

    def inputs(self, request: FillMaskRequest) -> list[str]:
        """See ``Task``."""
        return schema.texts_of(request.input, self.config.max_texts)

    def reply(self, request: FillMaskRequest, encoded: Encoded) -> FillMaskReply:
        """See ``Task``.

        Raises:
            InvalidRequestError: a text has no mask among the tokens that the model reads.
        """
        data = [self._filled(index, rows, request.top_k) for index, rows in enumerate(encoded.rows)]
        return FillMaskReply(data=data, model=self.config.name, usage=usage(encoded))

    def _filled(self, index: int, rows: Rows, top_k: int) -> Filled:
        if not len(rows):
            mask = self.model.tokenizer.mask_token
            raise InvalidRequestError(
                f"input[{index}] has no {mask} among the tokens that the model reads", param="input"
            )
        ids, scores = np.split(rows, 2, axis=1)
        masks = [
            [
                Candidate(int(token), self.model.tokenizer.decode(int(token)), score)
                for token, score in zip(row[:top_k].tolist(), values.tolist(), strict=False)
            ]
            for row, values in zip(ids, scores, strict=True)
        ]
        return Filled(index, masks)
