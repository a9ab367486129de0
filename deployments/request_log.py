"""The file of a router's request lines, in Ray's log directory beside Serve's own logs."""

import logging
import os
from logging.handlers import RotatingFileHandler
from pathlib import Path

from cluster.gateway.recording.request_log import LOGGER

MAX_BYTES = 32 * 1024**2
BACKUPS = 3


def open_request_log(directory: Path, replica_id: str) -> logging.Handler:
    """Have this process' request lines written to a file of its own, and nowhere else.

    Args:
        directory: Where logs are.
        replica_id: Of the router; part of the file's name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"tandem_requests_{os.getpid()}_{replica_id}.jsonl"
    handler = RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return handler


def close_request_log(handler: logging.Handler) -> None:
    """Write no more to the file."""
    logging.getLogger(LOGGER).removeHandler(handler)
    handler.close()
