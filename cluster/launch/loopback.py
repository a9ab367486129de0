"""Confinement of Serve's internal gRPC servers to loopback.

A replica's gRPC server accepts pickled requests and listens on all addresses (``[::]``); Serve has
no setting for it.
"""

import os
from typing import Any

VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def confine_serve() -> None:
    """Bind this replica's gRPC server to loopback, if the cluster is confined to it.

    Call it in the deployment's constructor; Serve starts the server afterwards.
    """
    if os.environ.get(VARIABLE) != "0":
        return
    from ray.serve._private import replica

    bind = replica.add_port_to_grpc_server

    def bind_to_loopback(server: Any, address: str) -> int:
        return int(bind(server, address.replace("[::]", "127.0.0.1")))

    replica.add_port_to_grpc_server = bind_to_loopback
