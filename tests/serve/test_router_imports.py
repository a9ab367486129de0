"""The router's process holds no model, so it must not load what models are run with."""

import subprocess
import sys

HEAVY = ("torch", "transformers", "tokenizers", "vllm")

LOADED = f"""
import sys
import deployments.app, deployments.router
print([name for name in {HEAVY} if name in sys.modules])
"""


def test_the_routers_modules_load_nothing_of_a_model() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
