"""Private names of Ray and Ray Serve; no other module uses any. Read from Ray 2.60.0.

Each of them exists because Ray has no public way to do the same, and each may change with the next
release: ``tests/unit/test_ray_internals.py`` names those that the installed Ray lacks.

``from cluster.ray_internals import DeploymentID`` imports the Ray module in which the name is
defined. Nothing is imported before, because importing Serve takes about two seconds.
"""

import importlib
import importlib.util
import inspect
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from cluster.errors import RayIncompatibleError

RAY_VERSION = "2.60.0"
"""Ray release that the names below were read from."""
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Environment variable of Ray; "0" binds all of Ray's ports to loopback."""


class PrivateName(NamedTuple):
    """A name in Ray, the reason for its use, and the parameters that are passed to it."""

    module: str
    name: str
    """Name in the module; members are separated by a dot."""
    purpose: str
    parameters: tuple[str, ...] = ()


_COMMON = "ray.serve._private.common"
_LONG_POLL = "ray.serve._private.long_poll"
_CONSTANTS = "ray.serve._private.constants"
_CONTROLLER = "ray.serve._private.controller"
_API = "ray.serve._private.api"
_KV = "ray.experimental.internal_kv"

EXPORTED = {
    "DeploymentID": PrivateName(
        _COMMON, "DeploymentID", "key of a deployment for the controller", ("name", "app_name")
    ),
    "DeploymentTargetInfo": PrivateName(
        _COMMON, "DeploymentTargetInfo", "message of a long poll for running replicas"
    ),
    "RunningReplicaInfo": PrivateName(
        _COMMON, "RunningReplicaInfo", "a running replica", ("replica_id", "replica_metadata")
    ),
    "LongPollClient": PrivateName(
        _LONG_POLL,
        "LongPollClient",
        "subscription to the running replicas",
        ("host_actor", "key_listeners", "call_in_event_loop", "client_id"),
    ),
    "LongPollNamespace": PrivateName(
        _LONG_POLL, "LongPollNamespace", "topic of a long poll (DEPLOYMENT_TARGETS)"
    ),
    "SERVE_CONTROLLER_NAME": PrivateName(
        _CONSTANTS, "SERVE_CONTROLLER_NAME", "actor name of Serve's controller"
    ),
    "SERVE_NAMESPACE": PrivateName(
        _CONSTANTS, "SERVE_NAMESPACE", "Ray namespace of Serve's controller"
    ),
    "get_serve_logs_dir": PrivateName(
        "ray.serve._private.logging_utils", "get_serve_logs_dir", "directory of the request log"
    ),
    "Node": PrivateName(
        "ray._private.node",
        "Node",
        "start of a head node whose dashboard starts in the background",
        ("ray_params", "head", "shutdown_at_exit", "spawn_reaper"),
    ),
    "RayParams": PrivateName("ray._private.parameter", "RayParams", "options of the head node"),
    "write_ray_address": PrivateName(
        "ray._private.utils", "write_ray_address", 'address that ``ray.init("auto")`` finds'
    ),
    "create_controller": PrivateName(
        _API,
        "_create_controller_and_proxy_refs",
        "start of Serve without waiting for its proxies",
        (
            "http_options",
            "grpc_options",
            "global_logging_config",
            "global_tracing_config",
            "controller_options",
            "proxy_location",
        ),
    ),
    "coerce_controller_options": PrivateName(
        _API, "_coerce_controller_options", "controller options in the form that the start takes"
    ),
}
"""Names that other modules import from here."""

MEMBERS = (
    PrivateName(_LONG_POLL, "LongPollNamespace.DEPLOYMENT_TARGETS", "running replicas"),
    PrivateName(_LONG_POLL, "LongPollClient.stop", "end of the subscription"),
    PrivateName("ray._private.node", "Node.start_api_server", "start of the dashboard"),
    PrivateName("ray._private.node", "Node.start_monitor", "start at a lower priority"),
    PrivateName("ray._private.node", "Node.start_log_monitor", "start at a lower priority"),
    PrivateName(_CONTROLLER, "ServeController.apply_config", "deployment of the application"),
    PrivateName(
        _CONTROLLER, "ServeController.get_serve_instance_details", "status of the application"
    ),
    PrivateName("ray.serve.handle", "DeploymentHandle._init", "see ``init_handle``"),
    PrivateName("ray.serve.handle", "DeploymentHandle.is_initialized", "see ``init_handle``"),
    PrivateName("ray.serve._private.replica", "SERVE_BUILD_ASGI_APP_METHOD", "hook of the router"),
    PrivateName(_CONSTANTS, "RECORD_REPLICA_METADATA_METHOD", "hook that publishes link addresses"),
    PrivateName(
        _KV, "_internal_kv_put", "key-value store", ("key", "value", "overwrite", "namespace")
    ),
    PrivateName(_KV, "_internal_kv_get", "key-value store", ("key", "namespace")),
    PrivateName(_KV, "_internal_kv_exists", "key-value store", ("key", "namespace")),
    PrivateName(_KV, "internal_kv_get_gcs_client", "key-value store with timeouts"),
)
"""Further names and members that must exist."""


def __getattr__(name: str) -> Any:
    if name not in EXPORTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return resolve(EXPORTED[name])


def resolve(private: PrivateName) -> Any:
    """Import and return a private name.

    Raises:
        RayIncompatibleError: the installed Ray does not have it, or without a parameter in use.
    """
    try:
        found: Any = importlib.import_module(private.module)
        for part in private.name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        raise _incompatible(f"`{private.name}` in {private.module}", private.purpose) from None
    if private.parameters:
        known = inspect.signature(found).parameters
        for parameter in private.parameters:
            if parameter not in known:
                missing = f"the parameter `{parameter}` of {private.module}.{private.name}"
                raise _incompatible(missing, private.purpose)
    return found


def _incompatible(expected: str, purpose: str) -> RayIncompatibleError:
    return RayIncompatibleError(
        f"Ray {version('ray')} does not have {expected} ({purpose}). "
        f"Install Ray {RAY_VERSION}, or adapt cluster/ray_internals.py."
    )


# -- ports ------------------------------------------------------------------------------------

_GRPC_PORT = 'add_port_to_grpc_server(self._server, "[::]:0")'


def confine_replica_to_loopback() -> None:
    """Bind the gRPC server of this replica to loopback if the cluster is confined to it.

    Serve accepts pickled requests there on every address and has no setting for it. It starts the
    server after the deployment's constructor, so call this in the constructor.

    Raises:
        RayIncompatibleError: Serve starts the server in another way, so the port would be open.
    """
    if os.environ.get(LOOPBACK_VARIABLE) != "0":
        return
    from ray.serve._private import replica

    if _GRPC_PORT not in inspect.getsource(replica):
        expected = f"`{_GRPC_PORT}` in ray.serve._private.replica"
        raise _incompatible(expected, "keeps the port for calls between replicas on loopback")
    add_port = replica.add_port_to_grpc_server

    def add_loopback_port(server: Any, address: str) -> int:
        return int(add_port(server, address.replace("[::]", "127.0.0.1")))

    replica.add_port_to_grpc_server = add_loopback_port


HAPROXY_BINDS = (
    "bind :{{ config.metrics_port }}",
    "bind {{ config.frontend_host }}:{{ config.frontend_port }}",
    "bind {{ config.grpc_frontend_host }}:{{ config.grpc_frontend_port }} proto h2",
    "bind *:{{ config.stats_port }}",
)
"""All ``bind`` lines in Serve's HAProxy template: metrics, HTTP, gRPC and statistics.

``cluster.launch.environment`` rewrites the first and the last, which listen on every address and
for which Serve has no setting.
"""


def check_haproxy_template() -> None:
    """Check that HAProxy will listen only where ``HAPROXY_BINDS`` says.

    Raises:
        RayIncompatibleError: the template's ``bind`` lines differ, so ports could be open.
    """
    # Found without an import: `tandem up` does not load Serve.
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    template = Path(spec.submodule_search_locations[0], "serve/_private/haproxy_templates.py")
    lines = template.read_text(encoding="utf-8").splitlines() if template.is_file() else []
    binds = tuple(line.strip() for line in lines if line.strip().startswith("bind "))
    if binds != HAPROXY_BINDS:
        expected = f"exactly the lines {'; '.join(HAPROXY_BINDS)} in {template}, but "
        found = "; ".join(binds) or "none"
        raise _incompatible(expected + found, "keeps HAProxy's metrics and statistics on loopback")


# -- handles ----------------------------------------------------------------------------------


def init_handle(handle: Any) -> None:
    """Make a deployment handle usable by threads without an event loop.

    Clusters tuned for throughput tell their jobs to route in the caller's event loop, which
    synchronous callers do not have. Serve shares one handle within a process.
    """
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)


# -- key-value store of the GCS ---------------------------------------------------------------

_NAMESPACE = b"tandem"


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
