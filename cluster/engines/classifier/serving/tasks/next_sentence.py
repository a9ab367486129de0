"""``/next-sentence``: probability that one sentence follows another (a training goal of BERT)."""

import time

from msgspec import Struct

from cluster.engines.classifier.model.types import Text
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import Task
from cluster.errors import InvalidRequestError


class NextSentenceRequest(schema.TaskRequest, frozen=True, kw_only=True):
    """Body of ``POST /next-sentence``: one or more pairs of sentences."""

    input: schema.ItemOrList


class Followed(Struct, frozen=True, gc=False):
    """Probability that the second sentence of a pair follows the first."""

    index: int
    is_next: bool
    score: float


class NextSentenceReply(schema.ListReply[Followed], frozen=True, kw_only=True):
    """Reply of ``POST /next-sentence``."""


class NextSentence(Task[NextSentenceRequest]):
    """Task ``next-sentence``."""

    name = "next-sentence"
    head = "classify"
    paths = ("/next-sentence",)
    summary = "Decide whether the second sentence of each pair follows the first."
    request = NextSentenceRequest
    response = NextSentenceReply

    def inputs(self, request: NextSentenceRequest) -> list[Text]:
        texts = schema.to_texts(request.input)
        schema.check_count(len(texts), self.config.max_texts)
        for index, text in enumerate(texts):
            if isinstance(text, str):
                message = f"input[{index}] is one text; a pair is needed: [text, text_pair]"
                raise InvalidRequestError(message, param="input")
        return texts

    def reply(self, request: NextSentenceRequest, encoded: Encoded) -> NextSentenceReply:
        # The first of BERT's two labels means that the second sentence follows.
        scores = encoded.rows_by_text("mean")[:, 0].tolist()
        data = [Followed(index, score >= 0.5, score) for index, score in enumerate(scores)]
        return NextSentenceReply(
            id=request.reply_id("next-sentence"),
            created=int(time.time()),
            data=data,
            model=self.config.name,
            usage=schema.usage(encoded),
        )
