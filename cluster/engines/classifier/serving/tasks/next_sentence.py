"""``/next-sentence``: whether one sentence follows another (BERT's second training goal)."""

from msgspec import Struct

from cluster.engines.classifier.model.types import Text
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import Listing, Request, Task, column, usage
from cluster.engines.classifier.serving.texts import ItemOrList, to_texts
from cluster.errors import InvalidRequestError


class NextSentenceRequest(Request, frozen=True, kw_only=True):
    """The body of ``POST /next-sentence``: a pair of sentences, or a list of pairs."""

    input: ItemOrList


class Followed(Struct, frozen=True, gc=False):
    """Whether the second sentence of a pair follows the first, and how likely that is."""

    index: int
    is_next: bool
    score: float


class NextSentenceReply(Listing[Followed], frozen=True, kw_only=True):
    """The answer of ``POST /next-sentence``."""


class NextSentence(Task[NextSentenceRequest]):
    """See the module."""

    name = "next-sentence"
    head = "classify"
    paths = ("/next-sentence",)
    summary = "Whether one sentence follows another, for a pair or each of a list."
    request = NextSentenceRequest
    response = NextSentenceReply

    def inputs(self, request: NextSentenceRequest) -> list[Text]:
        """See ``Task``."""
        texts = to_texts(request.input)
        schema.check_count(len(texts), self.config.max_texts)
        for index, text in enumerate(texts):
            if isinstance(text, str):
                raise InvalidRequestError(
                    f"input[{index}] is one text; a pair is needed: [text, text_pair]",
                    param="input",
                )
        return texts

    def reply(self, request: NextSentenceRequest, encoded: Encoded) -> NextSentenceReply:
        """See ``Task``."""
        # Of BERT's two labels the first means that the second sentence follows.
        data = [Followed(i, score >= 0.5, score) for i, score in enumerate(column(encoded, "mean"))]
        return NextSentenceReply(data=data, model=self.config.name, usage=usage(encoded))
