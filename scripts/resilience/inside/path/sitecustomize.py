"""Install the fault points of ``resilience.inside`` when ``cluster.link.server`` is imported."""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODULE = "cluster.link.server"


class InstallingLoader(Loader):
    """Loader that changes a module after it was executed."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        from resilience.inside.fault_points import install

        install(module)


class Finder(MetaPathFinder):
    """Finder of one module, once."""

    def find_spec(self, name: str, path: Any = None, _target: Any = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = InstallingLoader(spec.loader)
        return spec


sys.meta_path.insert(0, Finder())
