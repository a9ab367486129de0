"""Ray cancels a task by interrupting its worker's main thread, wherever that is just then."""

import subprocess
import sys

INTERRUPTED_IMPORT = """
import sys, threading, time, _thread
from contextlib import suppress

from cluster.client.client import import_serve

in_time = []

def interrupt_within_the_import():
    while "ray.serve._private" not in sys.modules:
        time.sleep(0.0001)
    _thread.interrupt_main()
    in_time.append("ray.serve.handle" not in sys.modules)

interrupter = threading.Thread(target=interrupt_within_the_import)
with suppress(KeyboardInterrupt):
    interrupter.start()
    import_serve()
    time.sleep(60)
interrupter.join()
assert in_time == [True], "the interrupt came too late to test anything"

import_serve()  # what the worker's next task does
from ray import serve

serve._private.default_impl.get_request_metadata
"""


def test_a_worker_whose_import_of_serve_was_cancelled_can_still_call() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
