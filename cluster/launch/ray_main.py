"""Runs as ``python -m cluster.launch.ray_main JSON``: starts a Ray head, and exits.

Does what ``ray start --head`` does, without that command's imports (all of Ray Serve, three
seconds), and without its Ray Client server, which cannot stream.
"""

import json
import sys
from typing import Any


def main(options: dict[str, Any]) -> None:
    """Start a head node; its processes go on when this one exits.

    ``options`` are fields of Ray's ``RayParams``, and ``ray_address``: what ``ray.init()`` of
    other jobs shall connect to.
    """
    from ray._private.node import Node
    from ray._private.parameter import RayParams
    from ray._private.utils import write_ray_address

    ray_address = options.pop("ray_address")
    Node(RayParams(**options), head=True, shutdown_at_exit=False, spawn_reaper=False)
    write_ray_address(ray_address)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
