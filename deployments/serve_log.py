"""Takes what the parts that do not know Serve log into the replica's own log file."""

import logging

SERVE = "ray.serve"
PACKAGE = "cluster"


def log_with_serve() -> None:
    """Have all of ``cluster`` log as Serve does: its file, its form, its level.

    Serve configures its own logger alone; of others a warning would go to the worker's stderr
    without a time, and how an engine started nowhere.
    """
    package = logging.getLogger(PACKAGE)
    package.parent = logging.getLogger(SERVE)
    package.setLevel(logging.NOTSET)  # loggers forget what level they remembered
