"""Log files of a replica's process: Serve's own, and the router's request log."""

import atexit
import logging
import os
import sys
from collections.abc import Sequence
from logging.handlers import MemoryHandler, RotatingFileHandler
from pathlib import Path

from cluster.gateway.recording.request_log import LOGGER

SERVE_LOGGER = "ray.serve"
PACKAGE_LOGGER = "cluster"
MAX_BYTES = 32 * 1024**2
BACKUPS = 3


def log_with_serve() -> None:
    """Send the log of package ``cluster`` to the file of this Serve replica.

    Serve configures only its own logger. Without this, warnings of other loggers go to the
    worker's stderr without a time, and their info lines are lost.

    Call this before libraries are imported: see ``_keep_open``.
    """
    for handler in logging.getLogger(SERVE_LOGGER).handlers:
        _keep_open(handler)
        _drop_what_cannot_be_written(handler)
        if isinstance(handler, MemoryHandler) and handler.target is not None:
            _drop_what_cannot_be_written(handler.target)
    package = logging.getLogger(PACKAGE_LOGGER)
    package.parent = logging.getLogger(SERVE_LOGGER)
    package.setLevel(logging.NOTSET)  # also clears the levels that child loggers have cached


def _keep_open(handler: logging.Handler) -> None:
    """Let a handler survive ``logging.config.dictConfig``, which closes all existing ones.

    Importing vLLM calls it, and other libraries may. A closed ``MemoryHandler`` has lost its
    target: Serve's log file ends, and a restarted controller, which asks for its path, takes the
    replica for dead.
    """
    handler.close = handler.flush  # type: ignore[method-assign]
    # dictConfig also removes the handler from those that are flushed at exit.
    atexit.register(handler.flush)


def _drop_what_cannot_be_written(handler: logging.Handler) -> None:
    """Drop the records of a handler silently while its file cannot be written (full disk).

    Python prints such errors to stderr, which Serve redirects to this log: each error would log the
    next ones, for seconds, until the recursion limit ends the request that wrote the record.
    """
    report = handler.handleError

    def handle_error(record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            report(record)

    handler.handleError = handle_error  # type: ignore[method-assign]


class ServeRelay(logging.Handler):
    """Handler that sends the records of another logger to the log of this Serve replica."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger(SERVE_LOGGER).handle(record)


def relay_to_serve(name: str, *, warnings_only: Sequence[str] = ()) -> None:
    """Replace the handlers of a library's logger by a relay to the log of this replica.

    Args:
        name: Name of the logger.
        warnings_only: Names of loggers below it whose info lines are dropped.
    """
    logging.getLogger(name).handlers[:] = [ServeRelay()]
    for verbose in warnings_only:
        logging.getLogger(verbose).setLevel(logging.WARNING)


def open_request_log(directory: Path, replica_id: str) -> logging.Handler:
    """Write the request log of this router to its own file only.

    Args:
        directory: Directory of the file.
        replica_id: Part of the file's name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"tandem_requests_{os.getpid()}_{replica_id}.jsonl"
    handler = RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    _drop_what_cannot_be_written(handler)
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return handler


def close_request_log(handler: logging.Handler) -> None:
    logging.getLogger(LOGGER).removeHandler(handler)
    handler.close()
