import contextlib
import logging
import logging.config
import os
import sys
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from pathlib import Path

import pytest

from cluster.gateway.recording.request_log import LOGGER
from deployments.logs import (
    PACKAGE_LOGGER,
    SERVE_LOGGER,
    close_request_log,
    log_with_serve,
    open_request_log,
    relay_to_serve,
)

LOGGERS = (SERVE_LOGGER, PACKAGE_LOGGER, None)


class RecordingHandler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def test_the_package_logs_to_the_file_of_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve, package, outer = (logging.getLogger(name) for name in LOGGERS)
    file, root = RecordingHandler(), RecordingHandler()
    monkeypatch.setattr(package, "parent", package.parent)
    monkeypatch.setattr(serve, "handlers", [file])
    monkeypatch.setattr(serve, "propagate", False)
    monkeypatch.setattr(outer, "handlers", [*outer.handlers, root])
    level = serve.level
    engine = logging.getLogger(f"{PACKAGE_LOGGER}.engines.some")
    assert not engine.isEnabledFor(logging.INFO)  # caches the level
    serve.setLevel(logging.INFO)
    try:
        log_with_serve()
        engine.info("ready")
        engine.debug("a token")
        logging.getLogger("another").warning("other")
    finally:
        serve.setLevel(level)
    assert [record.getMessage() for record in file.records] == ["ready"]
    assert [record.getMessage() for record in root.records] == ["other"]


@pytest.fixture
def serve_log(tmp_path: Path) -> Iterator[Path]:
    """Log file of a replica, written through the kind of handler that Serve uses."""
    package, serve = logging.getLogger(PACKAGE_LOGGER), logging.getLogger(SERVE_LOGGER)
    parent, level, handlers = package.parent, serve.level, serve.handlers[:]
    path = tmp_path / "replica.log"
    file = logging.FileHandler(path)
    serve.handlers[:] = [MemoryHandler(1, target=file)]
    serve.setLevel(logging.INFO)
    yield path
    file.close()
    serve.handlers[:] = handlers
    serve.setLevel(level)
    package.parent = parent


def test_the_log_goes_on_when_a_library_configures_logging(serve_log: Path) -> None:
    log_with_serve()
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    logging.getLogger(f"{SERVE_LOGGER}.tandem").info("after the import")
    assert serve_log.read_text() == "after the import\n"
    (handler,) = (
        handler
        for handler in logging.getLogger(SERVE_LOGGER).handlers
        if isinstance(handler, MemoryHandler)
    )
    assert handler.target is not None  # a restarted controller asks for its path


def test_warnings_of_a_library_reach_the_log_of_the_replica(serve_log: Path) -> None:
    library = logging.getLogger("some_library")
    library.propagate = False
    library.setLevel(logging.WARNING)
    relay_to_serve(library.name)
    library.getChild("engine").info("statistics")
    library.getChild("engine").warning("preempted")
    assert serve_log.read_text() == "preempted\n"


def test_statistics_of_a_library_do_not_fill_the_log_of_the_replica(serve_log: Path) -> None:
    library = logging.getLogger("verbose_library")
    library.propagate = False
    library.setLevel(logging.INFO)
    statistics = library.getChild("metrics.loggers")
    relay_to_serve(library.name, warnings_only=[statistics.name])
    statistics.info("throughput")
    library.getChild("engine").info("ready")
    assert serve_log.read_text() == "ready\n"


@pytest.mark.usefixtures("serve_log")
def test_a_full_disk_costs_the_log_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private.logging_utils import StreamToLogger

    serve, requests = logging.getLogger(SERVE_LOGGER), logging.getLogger(LOGGER)
    full = logging.FileHandler("/dev/full")
    serve.handlers[:] = [MemoryHandler(1, target=full)]
    # As in a replica: what Python's handlers report goes to the log that cannot be written.
    monkeypatch.setattr(sys, "stderr", StreamToLogger(serve, logging.INFO, sys.stderr))
    log_with_serve()
    (tmp_path / f"tandem_requests_{os.getpid()}_a.jsonl").symlink_to("/dev/full")
    request_log = open_request_log(tmp_path, "a")
    for logger in (serve, requests):
        logger.info("lost")
    for close in (full.close, lambda: close_request_log(request_log)):
        with contextlib.suppress(OSError):
            close()
