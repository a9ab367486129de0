"""Private names of Ray Serve, apart from its HAProxy; see ``ray_internals``.

``from cluster.serve_internals import DeploymentID`` imports Serve's module in which the name is
defined. Nothing is imported before, because importing Serve takes about two seconds.
"""

import asyncio
import functools
import inspect
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from cluster.ray_internals import (
    LOOPBACK_VARIABLE,
    PrivateName,
    incompatible,
    resolve,
    resolve_exported,
    server_rest,
)

logger = logging.getLogger("ray.serve.tandem")

_SERVE = "ray.serve._private"

EXPORTED = {
    "DeploymentID": PrivateName(
        f"{_SERVE}.common:DeploymentID", "key of a deployment in the controller", "name app_name"
    ),
    "DeploymentTargetInfo": PrivateName(
        f"{_SERVE}.common:DeploymentTargetInfo", "update of the running replicas"
    ),
    "RunningReplicaInfo": PrivateName(
        f"{_SERVE}.common:RunningReplicaInfo", "a running replica", "replica_id replica_metadata"
    ),
    "LongPollClient": PrivateName(
        f"{_SERVE}.long_poll:LongPollClient",
        "subscription to the running replicas",
        "host_actor key_listeners call_in_event_loop client_id",
    ),
    "LongPollNamespace": PrivateName(
        f"{_SERVE}.long_poll:LongPollNamespace", "topic of a subscription"
    ),
    "SERVE_CONTROLLER_NAME": PrivateName(
        f"{_SERVE}.constants:SERVE_CONTROLLER_NAME", "actor name of Serve's controller"
    ),
    "SERVE_NAMESPACE": PrivateName(
        f"{_SERVE}.constants:SERVE_NAMESPACE", "Ray namespace of Serve's controller"
    ),
    "get_serve_logs_dir": PrivateName(
        f"{_SERVE}.logging_utils:get_serve_logs_dir", "directory of the request log"
    ),
    "create_controller": PrivateName(
        f"{_SERVE}.api:_create_controller_and_proxy_refs",
        "start of Serve without waiting for its proxies",
        "http_options grpc_options global_logging_config global_tracing_config controller_options "
        "proxy_location",
    ),
    "coerce_controller_options": PrivateName(
        f"{_SERVE}.api:_coerce_controller_options", "options of ``create_controller``"
    ),
}
"""Names that other modules import from here."""

MEMBERS = (
    PrivateName(f"{_SERVE}.long_poll:LongPollNamespace.DEPLOYMENT_TARGETS", "running replicas"),
    PrivateName(f"{_SERVE}.long_poll:LongPollClient.stop", "end of a subscription"),
    PrivateName(
        f"{_SERVE}.long_poll:LongPollClient._process_update", "end after an error", "updates"
    ),
    PrivateName(f"{_SERVE}.controller:ServeController.apply_config", "start of the application"),
    PrivateName(
        f"{_SERVE}.controller:ServeController.get_serve_instance_details", "application status"
    ),
    PrivateName(
        f"{_SERVE}.controller:ServeController.get_proxies", "proxies to which settings apply"
    ),
    PrivateName(f"{_SERVE}.controller:ServeController.get_http_config", "see ``get_http_host``"),
    PrivateName(f"{_SERVE}.replica:SERVE_BUILD_ASGI_APP_METHOD", "hook of the router"),
    PrivateName(
        f"{_SERVE}.replica:start_asgi_http_server", "see ``wrap_http_app``", "app http_options"
    ),
    PrivateName(f"{_SERVE}.constants:RECORD_REPLICA_METADATA_METHOD", "hook for link addresses"),
    PrivateName(f"{_SERVE}.config:DeploymentConfig.to_proto_bytes", "see ``pin_version``"),
    PrivateName(
        f"{_SERVE}.deployment_state:DeploymentState._BROADCAST_STATES",
        "see ``keep_updating_replicas``",
    ),
    PrivateName(
        f"{_SERVE}.deployment_state:DeploymentState.get_running_replica_infos",
        "see ``keep_updating_replicas``",
    ),
    PrivateName(
        f"{_SERVE}.deployment_state:DeploymentReplica.get_running_replica_info",
        "see ``keep_updating_replicas``",
        "cluster_node_info_cache",
    ),
    PrivateName(
        f"{_SERVE}.constants:CONTROL_LOOP_INTERVAL_S", "see ``configured_control_interval``"
    ),
    PrivateName(f"{_SERVE}.controller:CONTROL_LOOP_INTERVAL_S", "see ``set_control_interval``"),
    PrivateName(
        f"{_SERVE}.deployment_state:CONTROL_LOOP_INTERVAL_S", "see ``set_control_interval``"
    ),
    PrivateName("ray.serve.handle:DeploymentHandle._init", "see ``init_handle``"),
    PrivateName("ray.serve.handle:DeploymentHandle.is_initialized", "see ``init_handle``"),
    PrivateName(f"{_SERVE}.controller:ServeController.get_app_configs", "deployed configuration"),
)
"""Further names and members that must exist."""


def __getattr__(name: str) -> Any:
    return resolve_exported(EXPORTED, name, __name__)


# -- HTTP and gRPC ----------------------------------------------------------------------------

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
        raise incompatible(expected, "keeps the port for calls between replicas on loopback")
    add_port = replica.add_port_to_grpc_server

    def add_loopback_port(server: Any, address: str) -> int:
        return int(add_port(server, address.replace("[::]", "127.0.0.1")))

    replica.add_port_to_grpc_server = add_loopback_port


async def get_http_host(timeout_s: float) -> str | None:
    """Return the address on which Serve's HTTP listens; None for all addresses.

    It cannot change while Serve runs.

    Raises:
        TimeoutError: Serve's controller does not answer in time.
    """
    async with asyncio.timeout(timeout_s):
        options = await _controller().get_http_config.remote()
    host: str | None = options.host
    return host


def wrap_http_app(
    wrap: Callable[[Any, bool], Any],
    host: str | None,
    open_socket: Callable[[int], socket.socket] | None,
) -> None:
    """Let this replica's HTTP server call ``wrap(app, has_middlewares)`` instead of Serve's app.

    It listens on ``host`` unless that is None. Serve itself uses ``http_options.host``, where
    HAProxy may not find it: that dials 127.0.0.1 on its own node, and the address of other nodes.
    The server also listens on the socket that ``open_socket`` returns for its port, unless this
    raises OSError. Serve starts the server after the deployment's constructor, so call this in the
    constructor.

    Raises:
        RayIncompatibleError: Serve starts the server in another way.
    """
    from ray.serve._private import replica

    if not hasattr(replica, "start_asgi_http_server"):
        expected = "`ray.serve._private.replica:start_asgi_http_server`"
        raise incompatible(expected, "formats errors, and hides headers that Serve cannot read")
    start = replica.start_asgi_http_server

    async def start_wrapped(app: Any, options: Any, **kwargs: Any) -> Any:
        own = options if host is None else options.model_copy(update={"host": host})
        task, server = await start(wrap(app, bool(own.middlewares)), own, **kwargs)
        if open_socket is not None:
            _add_socket(server, functools.partial(open_socket, own.port))
        server_rest()()
        return task, server

    replica.start_asgi_http_server = start_wrapped


def _add_socket(server: Any, open_socket: Callable[[], socket.socket]) -> None:
    """Let a uvicorn server that has not begun listen on another socket, too."""
    startup = server.startup

    async def startup_with_socket(sockets: list[socket.socket]) -> None:
        added = []
        try:
            added.append(open_socket())
        except OSError as error:
            logger.warning("HAProxy reaches this router by TCP, without a Unix socket: %s", error)
        await startup(sockets=[*sockets, *added])

    server.startup = startup_with_socket


# -- handles ----------------------------------------------------------------------------------


def pin_version(deployment: Any, code_version: str) -> None:
    """Set the version of a deployment.

    Serve's version is a hash of the whole application's arguments, so that any change of them would
    replace the replicas of all deployments. Serve assigns it after ``build`` returns.
    """
    from pydantic import PrivateAttr
    from ray.serve._private.config import DeploymentConfig

    class PinnedConfig(DeploymentConfig):  # type: ignore[misc]  # Ray is not typed
        _pinned_version: str = PrivateAttr(code_version)

        def to_proto_bytes(self) -> bytes:
            self.version = self._pinned_version
            encoded: bytes = super().to_proto_bytes()
            return encoded

    config = deployment._deployment_config
    deployment._deployment_config = PinnedConfig.model_construct(
        config.model_fields_set, **dict(config)
    )


def keep_updating_replicas() -> None:
    """Have Serve's controller, this process, list replicas while it reconfigures them.

    It takes them out of the list for a moment, although they go on serving. HAProxy would have no
    router in that moment if there is one only, and routers would move their answers.
    """
    from ray.serve._private.deployment_state import DeploymentState, ReplicaState

    listed = frozenset({*DeploymentState._BROADCAST_STATES, ReplicaState.UPDATING})

    def get_running_replica_infos(self: Any) -> list[Any]:
        nodes = self._cluster_node_info_cache
        return [each.get_running_replica_info(nodes) for each in self._replicas.get([*listed])]

    DeploymentState._BROADCAST_STATES = listed
    DeploymentState.get_running_replica_infos = get_running_replica_infos


def configured_control_interval() -> float:
    """Return the interval with which Serve was started, in seconds."""
    from ray.serve._private import constants

    return float(constants.CONTROL_LOOP_INTERVAL_S)


_wanted_intervals_s: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
# Here, since Serve pickles the policies' own module by value, once per policy.


def set_control_interval(policy: Any, wanted_s: float) -> None:
    """Set the pause between two passes of the loop of Serve's controller, this process.

    It is the shortest one that any policy wants.
    """
    from ray.serve._private import controller, deployment_state

    _wanted_intervals_s[policy] = wanted_s
    interval_s = min(_wanted_intervals_s.values())
    # The second module derives from it how many replicas to check in one pass.
    controller.CONTROL_LOOP_INTERVAL_S = interval_s
    deployment_state.CONTROL_LOOP_INTERVAL_S = interval_s


def init_handle(handle: Any) -> None:
    """Make a deployment handle usable by threads without an event loop.

    Clusters tuned for throughput tell their jobs to route in the caller's event loop, which
    synchronous callers do not have. Serve shares one handle within a process.
    """
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)


# -- configuration ----------------------------------------------------------------------------


async def read_serve_config() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the deployed configuration of each application, and the details of Serve's state."""
    controller = _controller()
    configs = await controller.get_app_configs.remote()
    return configs, await controller.get_serve_instance_details.remote()


async def apply_serve_config(applications: Sequence[Any], target_capacity: float | None) -> None:
    """Have Serve deploy exactly these applications, as ``serve deploy`` does."""
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema(applications=list(applications), target_capacity=target_capacity)
    await _controller().apply_config.remote(schema)


def _controller() -> Any:
    import ray

    name, namespace = (EXPORTED[f"SERVE_{key}"] for key in ("CONTROLLER_NAME", "NAMESPACE"))
    return ray.get_actor(resolve(name), namespace=resolve(namespace))
