"""Order of found passages by a cross-encoder, if one is configured."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.applications.knowledge.encoder import Encoder
from cluster.applications.tasks import Run
from cluster.errors import PermissionDeniedError, QuotaExhaustedError, RequestError

logger = logging.getLogger("ray.serve.tandem")


@dataclass(frozen=True, slots=True)
class Ordered:
    """Passages, best first."""

    rows: Sequence[dict[str, Any]]
    reranked: bool | None
    """True if the reranker ordered them, False if it failed, None if none was asked."""


class Reranking:
    """Reranking in one replica."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """Calls of the reranker by outcome: ok or failed."""

    async def order(
        self, rows: Sequence[dict[str, Any]], query: str, model: str | None, run: Run
    ) -> Ordered:
        """Return passages by the scores of ``model``, or as they are if it is None or fails.

        Raises:
            QuotaExhaustedError: A limit of the tenant is exceeded.
            PermissionDeniedError: The sender may not use the model.
        """
        if model is None or not rows:
            return Ordered(rows, None)
        texts = [row["content"] for row in rows]
        try:
            order = await Encoder(model, run.calls).rerank(query, texts)
        except RequestError as error:
            if isinstance(error, QuotaExhaustedError | PermissionDeniedError):
                raise
            self.counts["failed"] += 1
            logger.warning("the reranker %s failed; the search goes on without: %s", model, error)
            return Ordered(rows, False)
        self.counts["ok"] += 1
        return Ordered([rows[index] for index in order], True)
