"""Keeps Serve's calls between deployments on loopback where the rest of the cluster is.

A replica opens a gRPC server on every address (``[::]``) and takes pickled requests there; Serve
has no setting for it.
"""

import os
from typing import Any

VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def confine_serve() -> None:
    """Bind the gRPC server of this replica to loopback; to be called before it has started.

    Serve starts it after the deployment's constructor. Does nothing on a cluster that is not
    confined to loopback.
    """
    if os.environ.get(VARIABLE) != "0":
        return
    from ray.serve._private import replica

    bind = replica.add_port_to_grpc_server

    def bind_to_loopback(server: Any, address: str) -> int:
        return int(bind(server, address.replace("[::]", "127.0.0.1")))

    replica.add_port_to_grpc_server = bind_to_loopback
