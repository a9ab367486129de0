"""The encoder engine: BERT and its relatives for every task, behind the ``Engine`` protocol.

Imports run one way: ``jobs → queue, tokenizer, model → stage, runner → service → compute → tasks →
app → engine``.
"""

import os
from collections.abc import Callable

from cluster.config import ClassifierConfig
from cluster.engines.base import Engine
from cluster.engines.startup import gc_disabled


def make_classifier_engine(
    config: ClassifierConfig, resolve: Callable[[str], str] | None = None
) -> Engine:
    """The engine for ``config``, not yet started; ``resolve`` turns a model's name into a path.

    Raises:
        ConfigError: there is no such model.
    """
    # OpenMP reads this when torch loads: how long threads spin before they sleep. Not at all
    # doubles a lone text's time (7 ms for 3.6); the default, a millisecond, burns others' cores.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    with gc_disabled():
        from cluster.engines.classifier.engine import ClassifierEngine  # torch is slow to import

    if resolve is None:
        from cluster.models.store import resolve as resolve_in_store

        resolve = resolve_in_store
    return ClassifierEngine(config, resolve(config.model))
