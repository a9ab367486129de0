"""The client for other Ray jobs: finds the running application from any job and namespace.

    from cluster.client import Tandem

    tandem = Tandem()
    tandem.chat("What is the capital of France?").text
    tandem.classify(["A joy.", "A bore."])

It needs Ray, and neither vLLM nor torch. Errors are those of ``cluster.errors``.
"""

from cluster.client.client import Tandem
from cluster.client.results import (
    Candidate,
    Classification,
    Completion,
    Delta,
    Embedding,
    Entity,
    LabelScore,
    Ranked,
    Usage,
)

__all__ = [
    "Candidate",
    "Classification",
    "Completion",
    "Delta",
    "Embedding",
    "Entity",
    "LabelScore",
    "Ranked",
    "Tandem",
    "Usage",
]
