"""Classifier engine: BERT-like models for every task, behind the ``Engine`` protocol.

``serving`` turns HTTP requests into batches and replies, ``explain`` computes explanations,
``model`` holds the networks. Imports run ``serving → explain → model``.
"""

import os
from collections.abc import Callable

from cluster.config import ClassifierConfig
from cluster.engines.base import Engine
from cluster.engines.startup import gc_disabled, modules_hidden

UNUSED_MODULES = ("scipy", "sklearn")
"""Optional packages that transformers imports for other models; 33 MB and half a second."""
COMPILER = "triton"
"""Compiler for GPUs, which PyTorch imports wherever it is installed; 52 MB."""


def make_classifier_engine(
    config: ClassifierConfig, resolve: Callable[[str], str] | None = None
) -> Engine:
    """Return an engine for ``config`` that is not started yet.

    Args:
        config: The pool.
        resolve: Maps a model's name to its directory; None looks it up in the model store.

    Raises:
        ConfigError: There is no such model.
    """
    # Spin count of OpenMP threads before they sleep, read when torch loads. Without spinning, a
    # single text takes twice as long (7 ms instead of 3.6); the default, 1 ms, wastes cores.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    unused = UNUSED_MODULES if config.resources.gpus else (*UNUSED_MODULES, COMPILER)
    with gc_disabled(), modules_hidden(*unused):
        from cluster.engines.classifier.engine import ClassifierEngine  # torch is slow to import

    if resolve is None:
        from cluster.models.store import resolve as resolve_in_store

        resolve = resolve_in_store
    return ClassifierEngine(config, resolve(config.model))
