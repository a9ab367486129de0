"""Child process that lets this machine join a cluster (``python -m cluster.launch.joiner FD``).

It does what ``ray start --address`` does, and reads the properties of the cluster from its GCS.
"""

import json
import os
import time
from importlib.metadata import version
from typing import Any, TextIO, TypedDict

from cluster.launch.redis import RECONNECT_VARIABLE
from cluster.launch.starter import HEAD_KEY, KV_TIMEOUT_S, POLL_S, HeadInfo, run_child

HEAD_TIMEOUT_S = 20.0
"""Maximum time between the start of the GCS and the end of Ray's start, in seconds."""


class JoinerInput(TypedDict):
    """Description of the node to start."""

    ray: dict[str, Any]
    """Fields of Ray's ``RayParams``, without the size of the object store."""


def main(request: JoinerInput, reports: TextIO) -> None:
    from cluster.ray_internals import Node, RayParams, write_ray_address

    address = request["ray"]["gcs_address"]
    print(json.dumps({"phase": "Ray"}), file=reports, flush=True)
    head = read_head(address)
    print(json.dumps({"head": head}), file=reports, flush=True)
    if head["head_timeout_s"]:  # Ray's processes on this node inherit it
        os.environ.setdefault(RECONNECT_VARIABLE, str(head["head_timeout_s"]))
    params = RayParams(**request["ray"], object_store_memory=head["object_store_memory_bytes"])
    node = Node(params, head=False, shutdown_at_exit=False, spawn_reaper=False)
    write_ray_address(address, node.get_temp_dir_path())
    print(json.dumps({"phase": "done"}), file=reports, flush=True)


def read_head(gcs_address: str) -> HeadInfo:
    """Return the properties of the cluster, once a head that just starts has stored them.

    Raises:
        ValueError: ``tandem up --head`` of this version did not start it.
    """
    from cluster.ray_internals import read_remote_kv

    deadline = time.monotonic() + HEAD_TIMEOUT_S
    while (stored := read_remote_kv(gcs_address, HEAD_KEY, KV_TIMEOUT_S)) is None:
        if time.monotonic() > deadline:
            raise ValueError(f"the cluster at {gcs_address} was not started by `tandem up --head`")
        time.sleep(POLL_S)
    head: HeadInfo = json.loads(stored)
    if head["tandem"] != version("tandem"):
        raise ValueError(
            f"the head runs Tandem {head['tandem']}, this node has {version('tandem')}; "
            "install the same version"
        )
    return head


if __name__ == "__main__":
    run_child(main)
