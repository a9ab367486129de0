import logging

import pytest

from deployments.logs import PACKAGE_LOGGER, SERVE_LOGGER, log_with_serve

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
