"""Private names of Ray; no other module uses any. Read from Ray 2.60.0.

Each of them exists because Ray has no public way to do the same, and each may change with the next
release: ``tests/serve/test_ray_internals.py`` names those that the installed Ray lacks. Those of
Ray Serve are in ``serve_internals`` and ``haproxy_internals``.

``from cluster.ray_internals import Node`` imports the Ray module in which the name is defined.
Nothing is imported before, because importing Ray is slow.
"""

import importlib
import inspect
import json
import os
import queue
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, NamedTuple

from cluster.errors import RayIncompatibleError

RAY_VERSION = "2.60.0"
"""Ray release that the names below were read from."""
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Environment variable of Ray; "0" binds all of Ray's ports to loopback."""


class PrivateName(NamedTuple):
    """A name in Ray and the reason for its use."""

    path: str
    """Module and name, separated by a colon."""
    purpose: str
    parameters: str = ""
    """Parameters in use, separated by spaces."""


_NODE = "ray._private.node:Node"
_KV = "ray.experimental.internal_kv:"

EXPORTED = {
    "HEAD_NODE_RESOURCE_NAME": PrivateName(
        "ray._common.constants:HEAD_NODE_RESOURCE_NAME", "resource of the head alone"
    ),
    "Node": PrivateName(
        _NODE,
        "node of a cluster; a head's dashboard starts in the background",
        "ray_params head shutdown_at_exit spawn_reaper",
    ),
    "RayParams": PrivateName(
        "ray._private.parameter:RayParams",
        "options of a node",
        "node_ip_address gcs_address gcs_server_port num_cpus object_store_memory "
        "include_dashboard dashboard_host dashboard_port dashboard_agent_listen_port "
        "include_log_monitor temp_dir external_addresses num_redis_shards redis_username "
        "redis_password",
    ),
    "LogMonitor": PrivateName(
        "ray._private.log_monitor:LogMonitor", "modules that the forks of ``HELPER_MODULE`` share"
    ),
    "setproctitle": PrivateName("ray._raylet:setproctitle", "titles of these forks"),
    "SubprocessModuleHandle": PrivateName(
        "ray.dashboard.subprocesses.handle:SubprocessModuleHandle",
        "start of a module with its first request, and rarer checks",
    ),
    "DashboardHead": PrivateName(
        "ray.dashboard.head:DashboardHead", "metrics of the modules that have started"
    ),
    "cleanup_redis_storage": PrivateName(
        "ray._private.gcs_utils:cleanup_redis_storage",
        "end of a cluster whose GCS has its state in Redis",
        "host port password use_ssl storage_namespace username",
    ),
    "write_ray_address": PrivateName(
        "ray._private.utils:write_ray_address", "address that `ray.init()` of other jobs finds"
    ),
}
"""Names that other modules import from here."""

MEMBERS = (
    PrivateName(f"{_NODE}.start_api_server", "start of the dashboard in the background"),
    PrivateName(f"{_NODE}.get_temp_dir_path", "place of the address for other jobs"),
    PrivateName(
        "ray.dashboard.subprocesses.handle:SubprocessModuleHandle._do_once_health_check",
        "rarer checks of the dashboard's modules",
    ),
    *(
        PrivateName(
            f"ray.dashboard.subprocesses.handle:SubprocessModuleHandle.{name}",
            "start of a module with its first request",
        )
        for name in ("start_module", "wait_for_module_ready", "proxy_request")
    ),
    PrivateName(
        "ray.dashboard.head:DashboardHead._record_dashboard_metrics",
        "metrics of the modules that have started",
        "subprocess_module_handles",
    ),
    PrivateName(
        "ray.dashboard.head:enable_monitor_loop_lag",
        "rarer measurements of its event loop",
        "callback interval_s",
    ),
    PrivateName(f"{_KV}_internal_kv_put", "key-value store", "key value overwrite namespace"),
    PrivateName(f"{_KV}_internal_kv_get", "key-value store", "key namespace"),
    PrivateName(f"{_KV}_internal_kv_exists", "key-value store", "key namespace"),
    PrivateName(f"{_KV}internal_kv_get_gcs_client", "key-value store with timeouts"),
    PrivateName(f"{_KV}_internal_kv_list", "key-value store", "prefix namespace"),
    PrivateName(f"{_KV}_internal_kv_del", "key-value store", "key del_by_prefix namespace"),
    PrivateName("ray.core.generated.gcs_pb2:GcsNodeInfo.ALIVE", "count of the live nodes"),
    PrivateName("ray._raylet:InnerGcsClient.get_draining_nodes", "nodes that will leave"),
    PrivateName("ray._raylet:InnerGcsClient.drain_node", "`tandem drain NODE`"),
    PrivateName("ray.core.generated.autoscaler_pb2:DrainNodeReason.Value", "`tandem drain NODE`"),
    PrivateName("ray._private.state:available_resources_per_node", "free resources of the nodes"),
    PrivateName("ray._raylet:GcsClient", "see ``read_remote_kv``"),
    PrivateName(
        "ray._private.ray_constants:KV_NAMESPACE_DASHBOARD", "see ``read_dashboard_address``"
    ),
)
"""Further names and members that must exist."""


def __getattr__(name: str) -> Any:
    return resolve_exported(EXPORTED, name, __name__)


def resolve_exported(exported: Mapping[str, PrivateName], name: str, module: str) -> Any:
    """Return an exported name of a module, for its ``__getattr__``.

    Raises:
        AttributeError: the module does not export it.
        RayIncompatibleError: see ``resolve``.
    """
    if name not in exported:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return resolve(exported[name])


def resolve(private: PrivateName) -> Any:
    """Import and return a private name.

    Raises:
        RayIncompatibleError: the installed Ray does not have it, or without a parameter in use.
    """
    module, _, names = private.path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        raise incompatible(f"`{private.path}`", private.purpose) from None
    for parameter in private.parameters.split():
        if parameter not in inspect.signature(found).parameters:
            missing = f"the parameter `{parameter}` of `{private.path}`"
            raise incompatible(missing, private.purpose)
    return found


def incompatible(expected: str, purpose: str) -> RayIncompatibleError:
    """Return the error for something that the installed Ray does not have."""
    return RayIncompatibleError(
        f"Ray {version('ray')} does not have {expected} ({purpose}). "
        f"Install Ray {RAY_VERSION}, or adapt cluster/*_internals.py."
    )


# -- key-value store of the GCS ---------------------------------------------------------------

_NAMESPACE = b"tandem"
KEYS_KEY = b"keys"
"""Key of the API keys' digests and limits, in the format of the key file."""


def kv_put_if_absent(key: bytes, value: bytes) -> bool:
    """Store a value unless the key exists; return True if it was stored."""
    from ray.experimental import internal_kv

    return not internal_kv._internal_kv_put(key, value, overwrite=False, namespace=_NAMESPACE)


def kv_get(key: bytes) -> bytes | None:
    """Return the value of a key, or None."""
    from ray.experimental import internal_kv

    value: bytes | None = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
    return value


def kv_exists(key: bytes) -> bool:
    """Return True if the key exists."""
    from ray.experimental import internal_kv

    return bool(internal_kv._internal_kv_exists(key, namespace=_NAMESPACE))


def kv_put(key: bytes, value: bytes, timeout_s: float) -> None:
    """Store a value; raise a RayError after the timeout."""
    from ray.experimental import internal_kv

    gcs = internal_kv.internal_kv_get_gcs_client()
    gcs.internal_kv_put(key, value, True, namespace=_NAMESPACE, timeout=timeout_s)


def kv_get_many(keys: Sequence[bytes], timeout_s: float) -> list[bytes]:
    """Return the values of those keys that exist; raise a RayError after the timeout."""
    from ray.experimental import internal_kv

    gcs = internal_kv.internal_kv_get_gcs_client()
    found = gcs.internal_kv_multi_get(list(keys), namespace=_NAMESPACE, timeout=timeout_s)
    return list(found.values())


class RayNode(NamedTuple):
    """A live node."""

    id: str
    ip: str
    is_head: bool


def live_nodes(timeout_s: float) -> list[RayNode]:
    """Return the live nodes; raise a RayError after the timeout."""
    from ray.core.generated import gcs_pb2
    from ray.experimental import internal_kv

    nodes = internal_kv.internal_kv_get_gcs_client().get_all_node_info(timeout=timeout_s)
    return [
        RayNode(node.node_id.hex(), node.node_manager_address, node.is_head_node)
        for node in nodes.values()
        if node.state == gcs_pb2.GcsNodeInfo.ALIVE
    ]


def draining_nodes(timeout_s: float) -> frozenset[str]:
    """Return the ids of the nodes that drain; raise a RayError after the timeout."""
    from ray.experimental import internal_kv

    gcs = internal_kv.internal_kv_get_gcs_client()
    return frozenset(gcs.get_draining_nodes(timeout=timeout_s))


def drain_node(node_id: str, message: str, timeout_s: float) -> str:
    """Have Ray drain a node, however long it takes; return why it refuses, or an empty string.

    Raises:
        RayError: The timeout has passed.
    """
    from ray.core.generated import autoscaler_pb2
    from ray.experimental import internal_kv

    gcs = internal_kv.internal_kv_get_gcs_client()
    # A drain for another reason is refused unless the node is idle.
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, refusal = gcs.drain_node(node_id, reason, message, 0, timeout=timeout_s)
    return "" if accepted else refusal or "no reason given"


def kv_get_prefix(prefix: bytes, timeout_s: float) -> list[bytes]:
    """Return the values of all keys with a prefix; raise a RayError after the timeout."""
    from ray.experimental import internal_kv

    keys = internal_kv._internal_kv_list(prefix, namespace=_NAMESPACE)
    return kv_get_many(keys, timeout_s) if keys else []


def kv_delete(key: bytes) -> None:
    """Delete one key."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_del(key, namespace=_NAMESPACE)


def kv_delete_prefix(prefix: bytes) -> None:
    """Delete all keys with a prefix."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_del(prefix, del_by_prefix=True, namespace=_NAMESPACE)


def free_resources() -> list[dict[str, float]]:
    """Return the resources of each live node that nothing has reserved."""
    from ray._private import state

    return list(state.available_resources_per_node().values())


def read_remote_kv(gcs_address: str, key: bytes, timeout_s: float) -> bytes | None:
    """Return the value of a key in a cluster that this process is not connected to, or None.

    Raises:
        RayError: The GCS does not answer in time, or rejects the token.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # Cython

    client = GcsClient(address=gcs_address)
    value: bytes | None = client.internal_kv_get(key, _NAMESPACE, timeout=timeout_s)
    return value


def read_dashboard_address(gcs_address: str, timeout_s: float) -> str | None:
    """Return host and port of the dashboard of a cluster, or None.

    Raises:
        RayError: The GCS does not answer in time, or rejects the token.
    """
    from ray._private import ray_constants
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # Cython

    namespace = ray_constants.KV_NAMESPACE_DASHBOARD
    client = GcsClient(address=gcs_address)
    address = client.internal_kv_get(b"webui:url", namespace, timeout=timeout_s)
    return address.decode() if address else None


def write_remote_kv(gcs_address: str, key: bytes, value: bytes, timeout_s: float) -> None:
    """Store a value in a cluster that this process is not connected to.

    Raises:
        RayError: The GCS does not answer in time, or rejects the token.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # Cython

    client = GcsClient(address=gcs_address)
    client.internal_kv_put(key, value, True, _NAMESPACE, timeout=timeout_s)


def count_cpu_nodes(min_cpus: float, timeout_s: float) -> int:
    """Return the number of live nodes with CPUs, at least ``min_cpus`` of them.

    Raises:
        RayError: The timeout has passed.
    """
    from ray.core.generated import gcs_pb2
    from ray.experimental import internal_kv

    nodes = internal_kv.internal_kv_get_gcs_client().get_all_node_info(timeout=timeout_s)
    alive = gcs_pb2.GcsNodeInfo.ALIVE
    cpus = [node.resources_total.get("CPU", 0) for node in nodes.values() if node.state == alive]
    return sum(number > 0 and number >= min_cpus for number in cpus)


# -- dashboard --------------------------------------------------------------------------------

DASHBOARD_MODULES = (
    "EventHead",
    "JobHead",
    "MetricsHead",
    "NodeHead",
    "ReportHead",
    "ServeHead",
    "StateHead",
)


HELPER_MODULE = "cluster.launch.ray_helper"
"""Module that imports Ray and then runs each of some scripts of Ray in a fork."""
FORKED_TIMEOUT_S = 600.0
"""Time for which the start of the dashboard waits until the other two are to start, in seconds.
`tandem up` has its own limit."""


def limit_helpers() -> None:
    """Let this process start the head's dashboard, log monitor and monitor as forks of one process.

    ``HELPER_MODULE`` runs all three, once the dashboard is started. The dashboard has
    ``DASHBOARD_MODULES`` only: each module is a process, and those of Ray Data and Ray Train are
    left out.
    """
    from ray._private import ray_constants, services

    start = services.start_ray_process
    forked: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    forked_types = ray_constants.PROCESS_TYPE_MONITOR, ray_constants.PROCESS_TYPE_LOG_MONITOR

    def start_ray_process(command: list[str], process_type: str, **options: Any) -> Any:
        if process_type in forked_types:
            forked.put(_script(command))
            # Ray lists the ids for the isolation of resources, which Tandem does not use.
            running = SimpleNamespace(pid=os.getpid())
            return services.ProcessInfo(running, *[None] * (len(services.ProcessInfo._fields) - 1))
        if process_type == ray_constants.PROCESS_TYPE_DASHBOARD:
            scripts = [forked.get(timeout=FORKED_TIMEOUT_S) for _ in forked_types]
            script = [*_script(command), f"--modules-to-load={','.join(DASHBOARD_MODULES)}"]
            interpreter = command[: command.index(script[0])]
            command = [*interpreter, "-P", "-m", HELPER_MODULE, json.dumps(scripts), *script]
        return start(command, process_type, **options)

    services.start_ray_process = start_ray_process


def _script(command: list[str]) -> list[str]:
    """Return a command of Python without the interpreter and its options."""
    return command[next(place for place, word in enumerate(command) if word.endswith(".py")) :]


# -- idle workers -----------------------------------------------------------------------------

SIGNAL_REST_S = 0.2
"""Maximum sleep of a worker's main thread between two of Ray's checks for signals, in seconds."""


def signal_rest() -> Callable[[], None]:
    """Return a function that makes the main thread of this worker wake up less often.

    Ray checks for signals 100 times a second in the main thread of each worker, and has no setting
    for it. In an asynchronous actor, this thread only passes calls on to the event loop's thread.
    A check begins with a call of ``sys.is_finalizing``, which now sleeps in this thread. A signal
    ends the sleep; a call of the actor waits for its end.

    The function can be pickled by value, for actors that may be unable to import this package.
    """
    rest_s = SIGNAL_REST_S

    def rest_between_checks() -> None:
        import sys
        import threading
        import time

        is_finalizing, main = sys.is_finalizing, threading.main_thread().ident
        if hasattr(is_finalizing, "tandem_rests"):
            return

        def rest_and_check() -> bool:
            if threading.get_ident() == main and not is_finalizing():
                time.sleep(rest_s)
            return is_finalizing()

        rest_and_check.tandem_rests = True  # type: ignore[attr-defined]
        sys.is_finalizing = rest_and_check

    return rest_between_checks


SERVER_REST_S = 0.4
"""Additional pause of uvicorn's loop, in seconds; it delays the end of a server."""


def server_rest() -> Callable[[], None]:
    """Return a function that makes the HTTP servers of this process wake up less often.

    Ten times a second, uvicorn looks whether it should end, and once a second it writes the header
    ``date`` for all responses; it has no setting for either.

    The function can be pickled by value, for actors that may be unable to import this package.
    """
    rest_s = SERVER_REST_S

    def rest_between_ticks() -> None:
        import asyncio

        import uvicorn

        on_tick = uvicorn.Server.on_tick
        if hasattr(on_tick, "tandem_rests"):
            return

        async def on_rare_tick(server: Any, counter: int) -> bool:
            ends = await on_tick(server, 0)  # 0: write the header
            if not ends and counter:
                await asyncio.sleep(rest_s)
            return ends or server.should_exit

        on_rare_tick.tandem_rests = True  # type: ignore[attr-defined]
        uvicorn.Server.on_tick = on_rare_tick  # type: ignore[assignment, method-assign]

    return rest_between_ticks
