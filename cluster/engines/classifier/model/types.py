"""Inputs and outputs of an encoder network."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.config import ClassifierTask

Text = str | tuple[str, str]
"""A text, or a text and its pair."""
TokenIds = NDArray[np.int64]
"""Token ids of one input row. A token of the second segment (token type 1) is stored as ``~id``."""
ModelInput = Text | TokenIds
Rows = NDArray[np.float32]
Side = Literal["left", "right"]
"""Side on which a long text is cut."""
Merge = Literal["mean", "max"]
"""Merging of a text's windows into one result."""


class EncoderModel(Protocol):
    """Network that computes batches."""

    padding: float
    """Padding computed since the model was loaded, in token equivalents."""

    def run(self, task: ClassifierTask, ids: Sequence[TokenIds]) -> Rows | list[Rows]:
        """Return one result per row of ``ids``, which is sorted by ascending length.

        ``classify``: scores [texts, labels]. ``embed``: vectors [texts, width].
        ``token-classification``: per text, scores [tokens, labels]. ``fill-mask``: per text,
        [masks, 2 * candidates], the candidates' ids followed by their scores, best first.
        A text's result does not depend on the other texts of the batch, up to rounding.
        """


def num_chars(text: Text) -> int:
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])
