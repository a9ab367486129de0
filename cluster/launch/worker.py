"""The program that a local cluster's Ray workers run: Ray's own, but Serve does not load pandas.

Serve imports pandas, where it is installed, only to encode data frames that a deployment returns;
none of ours does. Without it a Serve process starts a quarter sooner and is 35 MB smaller. Ray
Data and users' own tasks get pandas as ever.
"""

import runpy
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

IMPORTER = "ray.serve._private.utils"


class NoPandasForServe(MetaPathFinder):
    """Says that there is no pandas, to the one module of Serve that asks."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        """Leave every import to the other finders, but for that one."""
        if name == "pandas" and _is_imported_by(IMPORTER):
            raise ModuleNotFoundError("pandas is kept out of Serve's processes", name=name)


def _is_imported_by(module: str) -> bool:
    frame: Any = sys._getframe(2)
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == module


def main() -> None:
    """Become Ray's default worker."""
    # Run as a file, this one's directory is where Python looks first, and its neighbours' names
    # are not all ours alone.
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
    import ray

    sys.meta_path.insert(0, NoPandasForServe())
    path = Path(ray.__file__).parent / "_private" / "workers" / "default_worker.py"
    sys.argv[0] = str(path)
    runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main()
