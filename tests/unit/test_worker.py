import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.launch import worker


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for pandas, and two modules that import it as Serve does."""
    (tmp_path / "pandas.py").write_text("")
    code = "try:\n    import pandas as pd\nexcept ImportError:\n    pd = None\n"
    for name in ("its_importer", "another"):
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(worker, "IMPORTER", "its_importer")
    monkeypatch.setattr(sys, "meta_path", [worker.NoPandasForServe(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "pandas", raising=False)
    yield
    for name in ("pandas", "its_importer", "another"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("modules")
def test_pandas_is_kept_from_one_importer_and_from_no_other() -> None:
    assert importlib.import_module("its_importer").pd is None
    assert importlib.import_module("another").pd is not None
    assert "pandas" in sys.modules
