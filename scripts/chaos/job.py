"""Ray job that streams from the model with Tandem's client until its standard input closes.

Runs as ``python -m chaos.job ADDRESS APPLICATION``, and writes each request as a line of JSON.
"""

import dataclasses
import json
import sys
import threading
import time
from typing import Any

from benchmarks.targets.running import REAL_MODEL
from chaos.accounting import Connection, measure
from chaos.target import JOB
from cluster.client import Tandem
from cluster.errors import LinkError, LinkRefusedError, RequestError

PAUSE_S = 0.1
OPTIONS: dict[str, Any] = {
    "model": REAL_MODEL,
    "max_tokens": 24,
    "temperature": 0,
    "ignore_eos": True,
}


def describe(error: Exception) -> tuple[str, Connection]:
    """Return a short name of a client's error, and what failed about its connection."""
    cause = error.__cause__
    if isinstance(cause, LinkError | ConnectionError):
        return type(cause).__name__, "refused" if isinstance(cause, LinkRefusedError) else "broken"
    if isinstance(error, RequestError):
        return f"{error.status} {error.type}", ""
    return type(error).__name__, ""


def main(address: str, application: str) -> None:
    stopped = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        stopped.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    tandem = Tandem(application, address=address)
    while not stopped.is_set():
        attempt = measure(JOB, tandem.stream("Name some colors.", **OPTIONS), describe)
        print(json.dumps(dataclasses.asdict(attempt)), flush=True)
        if attempt.error:
            time.sleep(PAUSE_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
