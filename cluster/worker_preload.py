"""Import of Ray Serve without pandas; every worker of Ray imports this module when it starts.

Serve imports pandas if it is installed, to encode data frames in responses of its HTTP server.
That takes 45 MB and 0.3 s of CPU time in each of Serve's processes.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from cluster.serve_internals import UTILS_MODULE

HIDDEN = "pandas"


class HidePandas(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finder that hides pandas from one module while that is imported."""

    def __init__(self) -> None:
        self._loader: importlib.abc.Loader | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != UTILS_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        assert self._loader is not None
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None
        if HIDDEN in sys.modules:
            self._loader.exec_module(module)
            return
        sys.modules[HIDDEN] = None  # type: ignore[assignment]  # importing it fails
        try:
            self._loader.exec_module(module)
        finally:
            del sys.modules[HIDDEN]


if UTILS_MODULE not in sys.modules:
    sys.meta_path.insert(0, HidePandas())
