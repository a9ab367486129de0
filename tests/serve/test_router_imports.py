"""Imports of the processes: no model libraries in the router, no collections in replicas."""

import subprocess
import sys

HEAVY = ("torch", "transformers", "tokenizers", "vllm")

LOADED = f"""
import sys
import deployments.app, deployments.router
print([name for name in {HEAVY} if name in sys.modules])
"""


def test_the_router_imports_no_model_library() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


MADE = """
import gc, sys
from cluster.config import ClassifierConfig
from cluster.engines.classifier import make_classifier_engine
make_classifier_engine(ClassifierConfig(name="cls", model="m"), lambda name: name)
print([name for name in ("scipy", "sklearn", "triton") if name in sys.modules])
print(gc.isenabled(), gc.get_freeze_count() > 100_000, gc.get_stats()[2]["collections"] < 5)
"""


def test_a_classifiers_code_is_imported_with_gc_disabled_and_without_unused_modules() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MADE], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines()[:2] == ["[]", "True True True"], done.stderr
