"""Ray Serve is imported without pandas, which stays importable."""

import subprocess
import sys

import pytest


def run(*statements: str) -> list[str]:
    code = "; ".join(("import sys", *statements))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_serve_does_not_import_pandas() -> None:
    pytest.importorskip("pandas")
    found = run(
        "import cluster.worker_preload, ray.serve",
        "print('pandas' in sys.modules)",
        "import pandas",
        "print(pandas.DataFrame({'a': [1]}).size)",
    )
    assert found == ["False", "1"]


def test_pandas_that_is_imported_already_is_used() -> None:
    pytest.importorskip("pandas")
    found = run(
        "import pandas, cluster.worker_preload, ray.serve",
        "from ray.serve._private.utils import serve_encoders",
        "print(pandas.DataFrame in serve_encoders)",
    )
    assert found == ["True"]


def test_only_one_module_is_affected() -> None:
    pytest.importorskip("pandas")
    assert run("import cluster.worker_preload, pandas", "print(pandas.__name__)") == ["pandas"]
