"""Label a Ray Data data set with the classifier of the running cluster.

Run it as a job of the cluster: `RAY_ADDRESS=... python examples/ray_data.py`.
"""

import numpy as np
import ray

from cluster.client import Tandem

REVIEWS = [
    "A warm, funny and wonderful film.",
    "A dull, clumsy waste of time.",
    "I could watch it again tomorrow.",
    "Terrible acting and a boring story.",
]


def label(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add the label and its score to a batch of texts."""
    results = Tandem().classify(batch["text"].tolist())
    batch["label"] = np.array([result.label for result in results])
    batch["score"] = np.array([result.score for result in results])
    return batch


if __name__ == "__main__":
    ray.init(address="auto", logging_level="ERROR")
    texts = ray.data.from_items([{"text": text} for text in REVIEWS * 250])
    labelled = texts.map_batches(label, batch_size=250, num_cpus=0.05)
    for row in labelled.take(4):
        print(f"{row['label']:8} {row['score']:.3f}  {row['text']}")
    print(labelled.count(), "texts")
