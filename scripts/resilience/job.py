"""Ray job that streams greedily with Tandem's client until its standard input closes.

Runs as ``python -m resilience.job ADDRESS APPLICATION``; writes each answer as a line of JSON.
"""

import dataclasses
import json
import sys
import threading
import time
from typing import Any

from cluster.client import Tandem
from resilience.accounting import Answer
from resilience.testbed import MODEL

PAUSE_S = 0.1
OPTIONS: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 24,
    "temperature": 0,
    "ignore_eos": True,
}


def main(address: str, application: str) -> None:
    stopped = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        stopped.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    tandem = Tandem(application, address=address)
    expected: str | None = None
    while not stopped.is_set():
        began_s = time.monotonic()
        data_s: list[float] = []
        pieces: list[str] = []
        error = ""
        try:
            for delta in tandem.stream("Name some colors.", **OPTIONS):
                data_s.append(time.monotonic())
                pieces.append(delta.text)
        except Exception as failure:  # must not end the load
            error = f"{type(failure).__name__}: {failure}"[:200]
            time.sleep(PAUSE_S)
        text = "".join(pieces)
        if expected is None and not error:
            expected = text
        diverged = not error and text != expected
        answer = Answer("job", began_s, time.monotonic(), tuple(data_s), error, (), diverged)
        print(json.dumps(dataclasses.asdict(answer)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
