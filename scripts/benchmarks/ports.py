"""Free ports. Standard library only: tests import it outside .venv, too."""

import contextlib
import random
import socket


def free_ports(count: int) -> list[int]:
    """Return ports that are free now.

    They lie below Linux's ephemeral ports, which a client connection could occupy before the server
    listens, and above the ports of Ray's workers.
    """
    found: list[int] = []
    for port in random.sample(range(20_000, 32_768), 100 + count):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"Found only {len(found)} of {count} free ports.")
