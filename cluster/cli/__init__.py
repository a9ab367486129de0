"""The ``tandem`` command line; ``main`` is the console script's entry point.

Commands import their dependencies when they run, so that ``--help`` is fast.
"""

import os
import sys


def main() -> None:
    """Run the command line; an error is one line on stderr and exit code 1.

    Only bad lines of a data file get a line each.
    """
    from cluster.cli.app import app

    try:
        app(prog_name="tandem")
    except Exception as error:
        if os.environ.get("TANDEM_DEBUG") == "1":
            raise
        from rich.console import Console

        from cluster.errors import DataError, TandemError

        text = str(error) if isinstance(error, DataError) else " ".join(str(error).split())
        if not isinstance(error, TandemError):  # a bug
            text = f"{type(error).__name__}: {text} (set TANDEM_DEBUG=1 for a traceback)"
        Console(stderr=True, soft_wrap=True).print(f"error: {text}", style="red", markup=False)
        sys.exit(1)
