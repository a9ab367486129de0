"""Client for other Ray jobs; finds the running application from any job and namespace.

    from cluster.client import Tandem

    tandem = Tandem()
    tandem.chat("What is the capital of France?").text
    tandem.classify(["A joy.", "A bore."])

The client needs Ray, but neither vLLM nor torch. It raises the errors of ``cluster.errors``.
"""

from cluster.client.client import Tandem
from cluster.client.results import (
    BatchState,
    Candidate,
    Classification,
    Completion,
    Delta,
    Embedding,
    Entity,
    LabelScore,
    Ranked,
)
from cluster.usage import Usage

__all__ = [
    "BatchState",
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
