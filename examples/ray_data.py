"""Label a Parquet data set with the classifier of the running cluster, through Ray Data.

Run it as a job of the cluster: `RAY_ADDRESS=... python examples/ray_data.py [IN OUT]`. IN is a
directory of Parquet files with a column `text`; without it, one is made of a few reviews.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cluster.client import Tandem

SMALL = {"num_cpus": 0.05}
"""Resources of a task; by default it waits for a whole CPU, which the models may have."""
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


def run(source: Path, target: Path) -> None:
    """Read, label and write; no process has the whole data set in memory."""
    texts = ray.data.read_parquet(str(source), ray_remote_args=SMALL)
    labelled = texts.map_batches(label, batch_size=250, **SMALL)
    labelled.write_parquet(str(target), ray_remote_args=SMALL)


def write_reviews(directory: Path) -> None:
    directory.mkdir()
    table = pa.table({"text": REVIEWS * 250})
    pq.write_table(table, directory / "reviews.parquet", row_group_size=250)


if __name__ == "__main__":
    ray.init(address="auto", logging_level="ERROR")
    with TemporaryDirectory() as temporary:
        paths = [Path(argument) for argument in sys.argv[1:]]
        source, target = paths or (Path(temporary, "reviews"), Path(temporary, "labelled"))
        if not paths:
            write_reviews(source)
        run(source, target)
        labelled = pq.read_table(target)
    for row in labelled.slice(0, 4).to_pylist():
        print(f"{row['label']:8} {row['score']:.3f}  {row['text']}")
    print(labelled.num_rows, "texts")
