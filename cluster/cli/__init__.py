"""The ``tandem`` command. ``main`` is the console script's entry point.

Each command imports what it needs when it runs, so that ``--help`` answers at once.
"""

import os
import sys


def main() -> None:
    """Run the command line; any error becomes one line on stderr and exit code 1."""
    from cluster.cli.app import app

    try:
        app(prog_name="tandem")
    except Exception as error:
        if os.environ.get("TANDEM_DEBUG") == "1":
            raise
        _complain(error)
        sys.exit(1)


def _complain(error: Exception) -> None:
    from rich.console import Console

    from cluster.errors import TandemError

    text = " ".join(str(error).split())
    if not isinstance(error, TandemError):  # a defect
        text = f"{type(error).__name__}: {text} (TANDEM_DEBUG=1 shows where)"
    Console(stderr=True, soft_wrap=True).print(f"error: {text}", style="red", markup=False)
